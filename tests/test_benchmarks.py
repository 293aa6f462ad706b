"""The benchmarks run, and compare the same work."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

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


def test_without_pytorch_it_says_what_to_install():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from experiments.benchmarks.train_step import main\n"
        "sys.exit(main([]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "this compares with PyTorch: pip install torch"
