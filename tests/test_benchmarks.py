"""The benchmarks run, and compare the same work."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.benchmarks import attention, attention_static
from experiments.benchmarks.scaling_fit import objective, synthetic
from scaling.runs import read_runs, write_runs

COMMAND = [sys.executable, "-m", "experiments.benchmarks.train_step", "--quick"]


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs the `oracle` extra")
def test_the_training_step_is_timed_against_pytorch_on_equal_losses(tmp_path):
    result = tmp_path / "result.json"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([*COMMAND, "--json", str(result)], check=True, env=environment)
    (told,) = json.loads(result.read_text())["results"]
    low, high = told["interval"]
    assert low <= told["ratio"] <= high
    assert set(told["seconds"]) == {"lineage_jax", "torch", "torch fused"}


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs the `oracle` extra")
def test_decoding_is_timed_against_transformers_on_equal_tokens(tmp_path, process_environment):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "experiments.benchmarks.decoding", "--quick"]
    subprocess.run([*command, "--json", str(result)], check=True, env=process_environment)
    for told in json.loads(result.read_text())["results"]:
        low, high = told["interval"]
        assert low <= told["ratio"] <= high


@pytest.mark.slow
def test_the_steps_of_milestones_are_timed_in_turns(tmp_path, process_environment):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "experiments.benchmarks.steps", "--rounds", "2"]
    command += ["--milestones", "seq2seq", "llama", "--json", str(result)]
    done = subprocess.run(
        command, check=True, env=process_environment, capture_output=True, text=True
    )
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[-2:]] == [
        "| seq2seq",
        "| llama",
    ]
    for told in json.loads(result.read_text())["results"]:
        assert len(told["seconds"]) == 2 and min(told["seconds"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["random", "clustered"])
def test_sparse_attention_is_timed_beside_full_attention(tmp_path, process_environment, selection):
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "experiments.benchmarks.attention", "--lengths", "96"]
    command += ["--heads", "2", "--groups", "1", "--width", "8", "--value-width", "6"]
    command += ["--rows", "2", "--rounds", "2", "--selection", selection, "--json", str(result)]
    subprocess.run(command, check=True, env=process_environment, capture_output=True)
    told = json.loads(result.read_text())["results"]
    names = {"full, ours", "full, XLA", "sparse", "- selected", "- window"}
    names |= {"- compressed, choice"}
    for kind in ("forward", "both", "decode"):
        assert {x["name"] for x in told if x["kind"] == kind} == names
    assert not [x for x in told if "refused" in x]
    for one in told:
        low, high = one["interval"]
        assert low <= one["ratio"] <= high
    assert max(x["ratio"] for x in told if x["name"].startswith("full")) == 1


def test_without_a_device_each_branch_has_a_row_as_soon_as_it_is_compiled(
    tmp_path, capsys, monkeypatch
):
    def compiled(branch, shape, topology, *, quick):
        took = {"full": 64.0, "selected": 8.0}.get(branch, 4.0)
        one = {"milliseconds": took, "spills": shape.heads, "around": 1.0, "temporaries": 0.5}
        return {"forward": one, "backward": one | {"refused": "does not fit"}}

    monkeypatch.setattr(attention_static, "measure", compiled)
    monkeypatch.setattr(attention_static, "measure_decode", lambda *_: {"refused": "too large"})
    monkeypatch.setattr(attention_static, "versions", lambda: {"libtpu": "1"})
    result = tmp_path / "result.json"
    options = ["--static", "v5e", "v6e", "--lengths", "2048", "--heads", "4"]
    assert attention.main([*options, "--json", str(result)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| v5e | 2048 | full | forward | 64.00 | 1.0 | 4 | 0.5 | 1.00 |"
    assert rows[3] == "| v5e | 2048 | full | backward | 64.00 | does not fit | 4 | 0.5 | 1.00 |"
    assert "| v6e | 2048 | sparse | forward | 16.00 | 3.0 | 12 |  | 4.00 |" in rows
    assert sum(row.startswith("| v6e | 2048 |") for row in rows) == 2 * 5 + 1 + 2
    told = json.loads(result.read_text())
    assert list(told) == ["v5e", "v6e"] and told["v6e"]["versions"] == {"libtpu": "1"}
    assert told["v5e"]["lengths"]["2048"]["decode"] == {"refused": "too large"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--static", "v5"], "wanted chips of v5e, v6e, v5p, tpu7x, or all, got 'v5'"),
        (
            ["--static", "v5e", "--store", "--heads", "2"],
            "wanted the paper's shape and random selections to --store",
        ),
    ],
)
def test_what_cannot_be_made_of_bundles_is_refused(capsys, options, why):
    assert attention.main(options) == 2
    assert capsys.readouterr().err.strip() == why


def test_without_pytorch_it_says_what_to_install():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from experiments.benchmarks.train_step import main\n"
        "sys.exit(main([]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "this compares with PyTorch: pip install torch"


@pytest.mark.slow
def test_the_fit_is_timed_against_scipy_at_equal_objectives(tmp_path, process_environment):
    runs, result = tmp_path / "runs.csv", tmp_path / "result.json"
    write_runs(read_runs(synthetic()), str(runs))
    command = [sys.executable, "-m", "experiments.benchmarks.scaling_fit", "--runs", str(runs)]
    command += ["--starts", "300", "--tried", "3", "--bootstrap", "4", "--refits", "2"]
    command += ["--rounds", "1", "--json", str(result)]
    subprocess.run(command, check=True, env=process_environment)
    told = {done["contender"]: done for done in json.loads(result.read_text())["results"]}
    ours = told["scaling"]
    for theirs in (told["scaling, bootstrap"], told["scipy"]):
        assert theirs["objective"] == pytest.approx(ours["objective"], rel=1e-6)
    assert told["scipy"]["starts"]["tried"] == 3
    assert told["scipy"]["parameters"] == pytest.approx(ours["parameters"], rel=1e-2)


def test_the_gradient_that_scipy_is_given_is_the_slope_of_the_objective():
    columns = synthetic(30)
    logs = [np.log(columns[name]) for name in ("params", "tokens", "loss")]
    u, weights = np.array([6.0, 7.5, 0.6, 0.34, 0.36]), np.arange(30) % 3
    _, gradient = objective(u[None], *logs, weights)
    ahead, _ = objective(u + 1e-6 * np.eye(5), *logs, weights)
    behind, _ = objective(u - 1e-6 * np.eye(5), *logs, weights)
    np.testing.assert_allclose(gradient[0], (ahead - behind) / 2e-6, rtol=1e-5)


def test_without_a_table_the_fit_is_not_timed(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.scaling_fit"]
    missing = str(tmp_path / "nowhere.csv")
    done = subprocess.run([*command, "--runs", missing], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nowhere.csv" in done.stderr and "Traceback" not in done.stderr
