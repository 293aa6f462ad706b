"""The benchmarks run, and compare the same work."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

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
    command += ["--milestones", "seq2seq", "bert", "--json", str(result)]
    done = subprocess.run(
        command, check=True, env=process_environment, capture_output=True, text=True
    )
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[-2:]] == [
        "| seq2seq",
        "| bert",
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
