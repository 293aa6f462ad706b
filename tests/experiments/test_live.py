"""A launch by the real compiler, where it is installed, for a slice that is not here."""

import importlib.util
import json
import shlex

import pytest

from lineage_jax import cli
from lineage_jax.pods import search

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="the TPU compiler is not installed: pip install 'lineage-jax[tpu]' (no TPU needed)",
    ),
]

SMALL = ["--vocab-size", "257", "--seq-len", "64", "--batch-tokens", "2048"]


def test_a_small_fit_becomes_a_run_on_eight_chips(fit_json, tmp_path, capsys, monkeypatch):
    for name, value in dict(TENSOR=(1, 2), DATA=(1,), REMATS=("full",), SURE=1).items():
        monkeypatch.setattr(search, name, value)
    path = tmp_path / "run.json"
    words = ["--flops", "1e15", "--topology", "v5e:2x4", *SMALL, "--json", str(path)]
    cli.main(["launch", fit_json, *words])
    out = capsys.readouterr().out
    told = json.loads(path.read_text())
    plan = told["plan"]
    assert plan["fits"]
    assert plan["params"] == told["params"]  # the compiled model's own
    assert plan["tokens_per_step"] == 2048
    per_second = plan["tokens_per_second_per_chip"] * plan["chips"]
    assert plan["days"] * 86400 * per_second == pytest.approx(told["tokens"], rel=1e-9)
    assert 0 < plan["mfu"] < 1
    assert "v5e:2x4: 8 chips, mesh" in out
    # The command is for this mesh, and for the micro-batches that were compiled.
    command = shlex.split(told["command"])
    train = told["experiment"]["train"]
    for axis, size in plan["mesh"].items():
        assert command[command.index(f"--mesh.{axis}") + 1] == str(size)
    if train["accumulate"] > 1:
        assert command[command.index("--train.accumulate") + 1] == str(train["accumulate"])
