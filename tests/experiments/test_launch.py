"""From a fit to a run: the arithmetic, the command line, and what is said; nothing is compiled."""

import dataclasses
import json
import shlex

import pytest

from experiments.launch import LaunchOptions, launch
from experiments.launch.sizes import FAMILIES
from lineage_jax import cli
from lineage_jax.cli import training
from scaling.flops import six_nd
from tests.pods.compiler import stub


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    return stub(
        monkeypatch,
        mfu=lambda request: 0.5,
        room=lambda request: 0.9 * request.topology.num_chips * request.topology.chip.hbm_bytes,
    )


def made(path, **options):
    return launch(path, LaunchOptions(**options), lambda line: None)


def trained(monkeypatch, words):
    """What `lineage train` reads from these words, without training it."""
    read, found = training.options, []

    class Read(Exception):
        """The options are read."""

    def stop(*arguments):
        found.append(read(*arguments))
        raise Read

    monkeypatch.setattr(training, "options", stop)
    with pytest.raises(Read):
        cli.main(words)
    return found[0]


@pytest.mark.parametrize("experiment", FAMILIES)
@pytest.mark.parametrize(
    "more", [{}, {"inference_tokens": 1e12}, {"seq_len": 4096, "batch_tokens": 2**22}]
)
def test_the_run_is_what_the_fit_says(fit_json, fitted, experiment, more):
    done = made(fit_json, flops=1e22, chip="v5e", experiment=experiment, **more)
    best = fitted.optimal(1e22, inference_tokens=more.get("inference_tokens", 0.0))
    assert done.best.params == pytest.approx(best.params, rel=1e-6)
    assert done.params == pytest.approx(best.params, rel=0.03)  # half of the 17 layers or more
    # The real shape is trained with the compute that was asked for, to within half of a step.
    chosen, plan = done.chosen.experiment, done.chosen.plan
    assert done.tokens == chosen.train.num_steps * plan.tokens_per_step
    assert six_nd(done.params, done.tokens) == pytest.approx(
        float(best.flops), abs=3 * done.params * plan.tokens_per_step
    )
    per_second = plan.tokens_per_second_per_chip * plan.chips
    assert plan.days * 86400 * per_second == pytest.approx(done.tokens, rel=1e-9)
    price = done.chosen.topology.chip.price
    assert plan.cost == pytest.approx(plan.days * 24 * plan.chips * price, rel=1e-9)
    assert plan.mesh == {"fsdp": 4}  # the first of the meshes on 2x2, which has room
    assert done.loss.low < done.loss.loss < done.loss.high
    assert done.loss.loss == pytest.approx(
        float(fitted.predict(params=done.params, tokens=done.tokens).loss), rel=1e-6
    )
    spent = six_nd(done.params, done.tokens)
    assert done.loss.loss >= fitted.optimal(spent).loss  # nothing is better than the optimum


@pytest.mark.parametrize("experiment", FAMILIES)
def test_the_command_trains_that_experiment(fit_json, monkeypatch, experiment):
    done = made(
        fit_json, flops=3e21, topology="v5e:4x4", experiment=experiment, data_path="my text/*.txt"
    )
    words = shlex.split(done.command())
    assert words[:3] == ["lineage", "train", experiment]
    read = trained(monkeypatch, words[1:])
    assert read.experiment == done.chosen.experiment
    assert read.experiment.data.path == "my text/*.txt"
    assert read.resume


def test_days_choose_the_slice(fit_json):
    slow = made(fit_json, flops=1e22, chip="v5p")
    fast = made(fit_json, flops=1e22, chip="v5p", days=slow.chosen.plan.days / 20)
    assert fast.chosen.plan.chips == 32 * slow.chosen.plan.chips
    assert fast.chosen.plan.days <= slow.chosen.plan.days / 20
    assert fast.tokens == slow.tokens


def test_a_law_without_embeddings_counts_without_them(fit_json):
    done = made(fit_json, flops=1e20, chip="v5e", count="non_embedding")
    whole = FAMILIES["llama"].num_params(done.chosen.experiment.model)
    assert done.params == whole["non_embedding"] < whole["total"]
    assert done.params == pytest.approx(float(done.best.params), rel=0.06)  # half of nine layers
    assert "without embeddings" in "\n".join(done.lines())


def test_everything_is_said_and_written(fit_json, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["launch", fit_json, "--flops", "1e24", "--chip", "v5p", "--json", "run.json"])
    out = capsys.readouterr().out
    for said in (
        "compute-optimal:", "llama: ", "from N*", "from D*", "predicted loss", "v5p:",
        "MFU 50.0%", "days", "USD", "lineage train llama --preset llama_7b",
        "export LIBTPU_INIT_ARGS=", "runs of up to 9e+20 FLOPs", "FLOPs, counted from the shape",
        "times the largest run fitted", "without --data-path it reads Python's own text",
    ):  # fmt: skip
        assert said in out
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["command"] in out
    assert told["plan"]["tokens"] == told["tokens"]
    assert (
        told["experiment"]["train"]["num_steps"] * told["plan"]["tokens_per_step"] == told["tokens"]
    )
    low, high = told["optimal"]["intervals"]["params"]
    assert low < told["optimal"]["params"] < high


def test_every_option_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    for field in dataclasses.fields(LaunchOptions):
        assert f"--{field.name.replace('_', '-')}" in out


def test_a_fit_without_draws_has_no_intervals_and_says_so(fitted, tmp_path):
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(dataclasses.replace(fitted, draws={}, intervals={}).to_json()))
    done = made(str(path), flops=1e21, chip="v5e")
    assert done.loss.low is None
    assert any("no bootstrap draws" in text for text in done.warnings)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "lineage launch FIT.json"),
        (["FIT"], "--flops"),
        (["FIT", "--flops", "1e21"], "wanted --chip, such as v5p, or --topology"),
        (["FIT", "--flops", "1e21", "--chip", "v9"], "--chip: wanted one of v4, v5e"),
        (["FIT", "--flops", "1e21", "--topology", "v5e:4"], "the torus of v5e has 2 dimensions"),
        (["FIT", "--flops", "1e21", "--topology", "v5e:4x4", "--days", "3"], "wanted --chip with"),
        (["FIT", "--flops", "1e21", "--chip", "v5e", "--days", "0"], "--days: wanted a positive"),
        (["FIT", "--flops", "-1", "--chip", "v5e"], "flops: wanted a positive number"),
        (["FIT", "--flops", "1e14", "--chip", "v5e"], "no shape of about"),
        (["FIT", "--flops", "1e21", "--chip", "v5e", "--batch-tokens", "3000"], "2048 tokens of"),
        (["FIT", "--flops", "1e21", "--chip", "v5e", "--experiment", "bert"], "llama"),
        (["pyproject.toml", "--flops", "1e21", "--chip", "v5e"], "pyproject.toml is not a fit"),
    ],
)
def test_what_cannot_be_launched_is_one_line(fit_json, capsys, arguments, told, request):
    words = [{"FIT": fit_json}.get(word, word) for word in arguments]
    words = [str(request.config.rootpath / w) if w == "pyproject.toml" else w for w in words]
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", *words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    assert told in lines[0]
