"""What people type, right and wrong: the answer, or one clear line and an exit code."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest

from lineage_jax import cli

TINY = (  # noqa: SIM905
    "--model.num-layers 1 --model.embed-dim 16 --model.num-heads 2 --data.seq-len 16 "
    "--data.batch-size 8 --train.num-steps 4 --train.eval-every 2 --train.checkpoint-every 2"
).split()
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind.\n" * 60


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the checkout or the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))


def run(capsys, *arguments):
    """The exit code, and what was printed to stdout and to stderr."""
    code = 0
    try:
        cli.main(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def refused(capsys, *arguments, code=2):
    """The one line that a wrong command ends in."""
    status, _, err = run(capsys, *arguments)
    told = [line for line in err.splitlines() if line.startswith("lineage: ")]
    assert status == code
    assert len(told) == 1
    assert err.rstrip().endswith(told[0])
    assert "Traceback" not in err
    return told[0]


def train(capsys, tmp_path, *more, text=TEXT, **options):
    path = tmp_path / "text.txt"
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return refused(capsys, "train", "gpt", *TINY, "--data.path", str(path), *more, **options)


def test_help_tells_a_newcomer_what_to_type_first(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "lineage train gpt --preset tiny" in out
    assert "lineage sweep laptop" in out


def test_help_does_not_wait_for_jax():
    script = (
        "import sys; from lineage_jax import cli; cli.main(['--help']); print('jax' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "False"


def test_list_and_show_tell_of_every_milestone(capsys):
    assert "gpt" in run(capsys, "list")[1]
    shown = run(capsys, "show", "gpt")[1]
    assert "Radford et al. 2018" in shown
    assert "gpt3_175b" in shown


def test_every_option_of_train_has_help(capsys):
    code, out, _ = run(capsys, "train", "gpt", "--help")
    assert code == 0
    assert "--model.num-layers" in out
    assert "--mesh.fsdp" in out


def test_a_run_trains_and_says_where_it_is(capsys, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, _ = run(capsys, "train", "gpt", *TINY, "--data.path", "text.txt")
    assert code == 0
    assert "runs/gpt-tiny" in out
    assert (tmp_path / "runs" / "gpt-tiny" / "metrics.jsonl").exists()
    line = refused(capsys, "train", "gpt", *TINY, "--data.path", "text.txt")
    assert "add --resume" in line


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["trian"], "did you mean train"),
        (["train"], "lineage train NAME"),
        (["train", "gtp"], "did you mean gpt"),
        (["show", "gtp"], "did you mean gpt"),
        (["show"], "lineage show NAME"),
        (["sweep", "labtop"], "did you mean laptop"),
        (["train", "gpt", "--preset", "gpt2_smal"], "did you mean gpt2_small"),
        (["train", "gpt", "--preset"], "--preset wants a value"),
        (["train", "gpt", "--model.num-layer", "3"], "--model.num-layers"),
        (["train", "gpt", "--model.num-layers", "three"], "--model.num-layers"),
        (["train", "gpt", "--model.num-layers", "0"], "num_layers must be at least 1, got 0"),
        (["train", "gpt", "--model.num-heads", "5"], "num_heads=5 must divide embed_dim=96"),
        (["train", "gpt", "--model.dtype", "float8"], "float32"),
    ],
)
def test_a_typo_is_answered_with_what_was_meant(capsys, arguments, told):
    assert told in refused(capsys, *arguments)


def test_a_missing_text_is_an_io_error(capsys):
    line = refused(capsys, "train", "gpt", "--data.path", "nowhere.txt", code=1)
    assert "nowhere.txt" in line


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "empty"),
        ("one line\n", "give more text"),
        (bytes(range(256)) * 40, "text.txt"),
        (b"good line\n" * 50 + b"bad \xff\xfe line\n", "text.txt:51"),
    ],
)
def test_text_that_is_not_text_is_refused_by_name(capsys, tmp_path, text, told):
    assert told in train(capsys, tmp_path, text=text)


def test_a_token_id_outside_the_vocabulary_is_refused(capsys, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokens = [list(range(40)) * 30, [5, 999, 7]]
    pq.write_table(pa.table({"tokens": tokens}), tmp_path / "t.parquet")
    line = refused(
        capsys, "train", "gpt", *TINY, "--data.path", "t.parquet", "--data.vocab-size", "50"
    )
    assert "999" in line
    assert "t.parquet" in line


def test_text_with_more_ids_than_the_model_is_refused(capsys, tmp_path):
    line = train(capsys, tmp_path, "--model.vocab-size", "100")
    assert "--model.vocab-size 257" in line


def test_rows_longer_than_the_model_are_refused(capsys, tmp_path):
    assert "--model.max-len" in train(capsys, tmp_path, "--model.max-len", "8")


@pytest.mark.parametrize(
    "mesh, told",
    [
        (["--mesh.data", "3"], "mesh data=3 needs 3 devices, got 8"),
        (
            ["--mesh.tensor", "4"],
            "of 2 does not divide over mesh axis tensor=4; sizes that would: 1, 2",
        ),
        (["--mesh.data", "0"], "mesh axes must be 1 or more"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_would(capsys, tmp_path, mesh, told):
    assert told in train(capsys, tmp_path, *mesh)


def test_a_batch_that_does_not_divide_says_what_would(capsys, tmp_path):
    line = train(capsys, tmp_path, "--data.batch-size", "12")
    assert (
        "axis 'batch' of 12 does not divide over mesh axis data=8" in line
        and "multiple of 8" in line
    )
    line = train(capsys, tmp_path, "--train.accumulate", "3")
    assert "accumulate=3" in line


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of that size, mounted at `folder`; skips where mounting is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_says_which_step_is_safe(capsys, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, "400k"):
        more = ["--run-dir", str(disk / "run"), "--model.embed-dim", "64"]
        line = train(capsys, tmp_path, *more, code=1)
    assert "cannot save a checkpoint" in line or "No space left" in line


@pytest.mark.slow
def test_a_corrupted_checkpoint_is_passed_over_and_then_refused(capsys, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["train", "gpt", *TINY, "--data.path", "text.txt", "--run-dir", "r"]
    assert run(capsys, *command)[0] == 0

    def corrupt(step):
        folder = tmp_path / "r" / "checkpoints" / "steps" / str(step)
        largest = max(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        return largest.name

    name = corrupt(4)
    code, _, err = run(capsys, *command, "--resume")
    assert code == 0
    assert name in err
    assert "resumed from step 2" in err
    corrupt(4), corrupt(2)
    assert "no intact checkpoint" in refused(capsys, *command, "--resume", code=1)


def runs_csv(path, rows):
    lines = ["params,tokens,loss", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def chinchilla_rows():
    return [
        (n, d, 1.7 + 400 / n**0.34 + 400 / d**0.28)
        for n in np.logspace(6, 9, 6)
        for d in np.logspace(8, 11, 6)
    ]


def test_fit_reads_anybodys_csv(capsys, tmp_path):
    runs_csv(tmp_path / "mine.csv", [*chinchilla_rows(), (1e7, 1e9, "nan")])
    code, out, _ = run(
        capsys, "fit", "mine.csv", "--law", "chinchilla", "--bootstrap", "0", "--json", "o.json"
    )
    assert code == 0
    assert "alpha" in out
    import json

    told = json.loads((tmp_path / "o.json").read_text())
    assert told["parameters"]["alpha"] == pytest.approx(0.34, rel=1e-4)
    assert told["dropped"] == [{"reason": "loss is not a finite number", "n": 1}]


@pytest.mark.parametrize("law", ["envelope", "isoflop", "kaplan_c", "chinchilla_tied"])
def test_fit_knows_every_law_and_approach(capsys, tmp_path, law):
    budgets = [(n, c / (6 * n)) for c in (1e18, 1e19, 1e20) for n in np.geomspace(2e7, 5e9, 12)]
    rows = [(n, d, 1.7 + 400 / n**0.34 + 400 / d**0.28) for n, d in budgets]
    runs_csv(tmp_path / "mine.csv", rows)
    more = ("--method", "akima") if law == "isoflop" else ()
    code, out, _ = run(capsys, "fit", "mine.csv", "--law", law, "--bootstrap", "20", *more)
    assert code == 0 and law in out
    import json

    told = json.loads((tmp_path / "mine-fit.json").read_text())
    assert told["law"] == law
    assert {"parameters", "objective", "certificate", "intervals", "optimal"} <= told.keys()
    if law in ("envelope", "isoflop"):
        names = ["a", "params_coefficient", "b", "tokens_coefficient"]
        assert list(told["parameters"]) == names
        assert told["parameters"]["a"] == pytest.approx(0.28 / (0.28 + 0.34), abs=0.05)


@pytest.mark.parametrize(
    "rows, more, told",
    [
        ([(1e6, 1e8, 3.0)] * 3, [], "free parameters"),
        ([(1e6, 1e8, "nan")] * 9, [], "no usable rows"),
        ([], [], "no rows"),
        (chinchilla_rows(), ["--columns", "params=N"], "no column 'N'"),
        (chinchilla_rows(), ["--columns", "N"], "--columns wants name=value"),
        (chinchilla_rows(), ["--where", "tokns>1"], "tokens"),
        (chinchilla_rows(), ["--law", "chinchila"], "chinchilla"),
    ],
)
def test_runs_that_cannot_be_fitted_say_why(capsys, tmp_path, rows, more, told):
    runs_csv(tmp_path / "r.csv", rows)
    line = refused(capsys, "fit", "r.csv", "--bootstrap", "0", "--law", "chinchilla", *more)
    assert told in line


def test_runs_that_are_not_there_are_an_io_error(capsys):
    assert "nowhere.csv" in refused(capsys, "fit", "nowhere.csv", code=1)


def test_debug_shows_where_an_error_came_from(capsys):
    _, _, err = run(capsys, "show", "gtp", "--debug")
    assert "Traceback" in err


def test_a_sweep_is_planned_with_tables_assumptions_and_json(capsys, tmp_path):
    grid = "--flops-min 1e15 --flops-max 1e16 --budgets 3 --sizes 4".split()  # noqa: SIM905
    code, out, _ = run(capsys, "plan-sweep", *grid, "--hardware", "h200", "--price", "3")
    assert code == 0
    for said in ("4 x 256", "6ND", "12 runs", "1 x h200", "at 3 a chip hour", "0.4 MFU", "20 N"):
        assert said in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    import json

    told = json.loads((tmp_path / "plan.json").read_text())
    assert sum(len(size["runs"]) for size in told["sizes"]) == told["totals"]["runs"] == 12


def test_a_plan_with_a_fit_says_which_run_to_add(capsys, tmp_path):
    rng = np.random.default_rng(0)
    rows = [(n, d, loss * np.exp(0.01 * rng.standard_normal())) for n, d, loss in chinchilla_rows()]
    runs_csv(tmp_path / "mine.csv", rows)
    assert run(capsys, "fit", "mine.csv", "--law", "chinchilla", "--bootstrap", "100")[0] == 0
    grid = "--flops-min 1e19 --flops-max 1e20 --budgets 2 --fit mine-fit.json".split()  # noqa: SIM905
    code, out, _ = run(capsys, "plan-sweep", *grid, "--target", "1e24", "--json", "next.json")
    assert code == 0
    assert "by chinchilla of mine-fit.json" in " ".join(out.split())
    assert "95 % interval" in " ".join(out.split())
    import json

    ranked = json.loads((tmp_path / "next.json").read_text())["next"]
    assert ranked[0]["after"] < ranked[0]["now"]
    assert ranked[0]["gain"] == max(row["gain"] for row in ranked)
    line = refused(capsys, "plan-sweep", *grid[:-1], "mine.csv")
    assert "mine.csv is not a fit" in line


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["plan-swep"], "did you mean plan-sweep"),
        (["plan-sweep"], "--flops-min"),
        (["plan-sweep", "--flops-min", "1e18", "--flops-max", "1e15"], "--flops-min < --flops-max"),
        (
            ["plan-sweep", "--flops-min", "1e15", "--flops-max", "1e18", "--hardware", "h20"],
            "did you mean h200",
        ),
        (["sweep", "edited.json"], "edited.json is not a plan: wanted the JSON"),
    ],
)
def test_a_plan_that_cannot_be_made_or_read_says_why(capsys, tmp_path, arguments, told):
    (tmp_path / "edited.json").write_text('{"plan": "mine"}')
    assert told in refused(capsys, *arguments)


def test_a_plan_that_is_not_there_is_an_io_error(capsys):
    assert "nowhere.json" in refused(capsys, "sweep", "nowhere.json", code=1)


@pytest.mark.parametrize("model", ["bpe", "wordpiece", "unigram"])
def test_a_tokenizer_is_trained_summed_up_and_read_by_a_run(capsys, tmp_path, model):
    from lineage_jax.data import TextData, load_text

    (tmp_path / "text.txt").write_text(TEXT)
    size = ["--vocab-size", "290", "--sentinels", "2", "--out", "mine.json"]
    command = ["tokenizer", "train", "--model", model, "--path", "text.txt"]
    code, out, _ = run(capsys, *command, *size)
    said, summary = out.splitlines()
    assert code == 0
    assert said.startswith(f"training {model} on 0.0 MB of text.txt")
    settings = {"path": "text.txt", "tokenizer": "mine.json", "cache_dir": str(tmp_path)}
    data = load_text(TextData(**settings, seq_len=8, batch_size=2))
    assert summary.startswith(f"mine.json: {model}, {data.vocab_size} tokens; ")
    assert f"; {data.bytes_per_token:.3f} bytes per token" in summary
    assert data.bytes_per_token > 1 and data.vocab_size <= 290


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["tokenizer"], "lineage tokenizer train"),
        (["tokenizer", "trian"], "lineage tokenizer train"),
        (["tokeniser", "train"], "did you mean tokenizer"),
        (["tokenizer", "train", "--model", "bp"], "'bpe', 'wordpiece', 'unigram'"),
        (["tokenizer", "train", "--vocab", "9"], "--vocab-size"),
        (["tokenizer", "train", "--vocab-size", "256", "--path", "short.txt"], "at least 257"),
        (["tokenizer", "train", "--sentinels", "9000"], "0 <= sentinels < vocab_size"),
        (["tokenizer", "train", "--path", "one.txt"], "too short to hold out"),
        (["tokenizer", "train", "--path", "empty.txt"], "empty.txt: wanted text"),
        (["tokenizer", "train", "--out", "mine"], "--out to end in .json"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_says_why(capsys, tmp_path, arguments, told):
    for name, text in (("short.txt", TEXT), ("one.txt", "One line.\n"), ("empty.txt", "")):
        (tmp_path / name).write_text(text)
    assert told in refused(capsys, *arguments)


def test_a_text_to_train_a_tokenizer_on_that_is_not_there_is_an_io_error(capsys):
    line = refused(capsys, "tokenizer", "train", "--path", "nowhere.txt", code=1)
    assert "nowhere.txt: no such file" in line
