"""The mean of a run's last checkpoints, as a run of its own."""

import jax
import numpy as np
import pytest

from experiments.averaging import mean
from experiments.saved import abstract_state, open_run, recorded
from lineage_jax import cli
from lineage_jax.train.checkpoint import Checkpoints

TINY = {
    "--model.num-layers": 1,
    "--model.embed-dim": 16,
    "--model.max-len": 16,
    "--data.seq-len": 16,
    "--data.batch-size": 8,
    "--train.num-steps": 3,
    "--train.checkpoint-every": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run") / "gpt")
    options = [f"{name}={value}" for name, value in TINY.items()]
    cli.main(["train", "gpt", "--preset", "tiny", "--run-dir", folder, *options])
    return folder


def test_a_mean_is_taken_in_float64_and_keeps_its_types():
    # In float32 the small ones would be lost beside the large one.
    trees = [{"a": np.float32(x)} for x in (2.0**24, 1.0, 1.0, 2.0)]
    averaged = mean(trees[0], trees[1:], 4)
    assert averaged["a"].dtype == np.float32
    assert float(averaged["a"]) == (2**24 + 4) / 4


def test_the_mean_of_a_run_is_a_run_that_opens(run, tmp_path, capsys):
    out = str(tmp_path / "mean")
    cli.main(["average", run, "--last", "2", "--out", out])
    assert capsys.readouterr().out.strip() == f"{out}: the mean of steps 2, 3"
    like = abstract_state(recorded(run)[1])
    with Checkpoints(f"{run}/checkpoints", keep=None) as checkpoints:
        second, third = (checkpoints.restore(step, like).params for step in (2, 3))
    averaged = open_run(out)
    assert averaged.step == 3
    jax.tree.map(
        lambda x, a, b: np.testing.assert_allclose(x, (a + b) / 2, rtol=1e-6, atol=1e-8),
        averaged.params,
        second,
        third,
    )


@pytest.mark.slow
def test_a_run_that_averages_as_it_trains_is_not_averaged_once_more(tmp_path, capsys):
    folder = str(tmp_path / "ulmfit")
    sizes = {"embed-dim": 8, "hidden-dim": 8}
    options = [f"--model.{name}={value}" for name, value in sizes.items()]
    options += ["--train.num-steps=2", "--train.checkpoint-every=1"]
    cli.main(["train", "ulmfit", "--preset", "tiny", "--run-dir", folder, *options])
    with pytest.raises(SystemExit) as stop:
        cli.main(["average", folder, "--last", "2"])
    assert stop.value.code == 2
    assert "averages its parameters as it trains" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra, told",
    [
        (["--last", "4"], "has 3 checkpoints, wanted 4"),
        (["--last", "1"], "last must be at least 2, got 1"),
        (["--out", "."], ". is there already"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(run, extra, told, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["average", run, *extra])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
