"""Intervals cover as often as they say, whatever they come from; what is not bounded is open."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from scaling.fit import fit
from scaling.runs import read_runs
from scaling.uncertainty import RESAMPLING, resample


def test_a_group_is_resampled_whole():
    groups = np.array(["a", "a", "b", "c", "c", "c"])
    weights = resample(6, 50, 0, groups)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say(process_environment):
    environment = {**process_environment, "XLA_FLAGS": ""}
    command = [sys.executable, str(pathlib.Path(__file__).parent / "coverage.py")]
    command += ["cases", "huber"]
    said = subprocess.run(command, check=True, env=environment, capture_output=True).stdout
    rates = json.loads(said)
    assert all(0.90 <= rate <= 0.98 for rate in rates.values()), rates


def test_drawn_residuals_spread_a_fit_about_as_drawn_cases_do(synthetic):
    runs = read_runs(synthetic(sizes=8, budgets=8))
    cases, residuals = (
        fit(runs, loss="mse", bootstrap=400, resampling=resampling).standard_errors
        for resampling in RESAMPLING
    )
    for name, error in cases.items():
        assert residuals[name] == pytest.approx(error, rel=0.35)


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_the_profile_of_a_parameter_agrees_with_its_bootstrap(synthetic, loss):
    done = fit(
        read_runs(synthetic(sizes=9, budgets=8)), loss=loss, delta=3e-3, bootstrap=400,
        profiles=("E", "alpha"),
    )  # fmt: skip
    for name, found in done.profiles.items():
        low, high = found.interval
        assert low < done.parameters[name] < high
        width = np.subtract(*done.intervals[name][::-1])
        assert high - low == pytest.approx(width, rel=0.4)
        inside = (found.values > low) & (found.values < high)
        assert (found.statistic[inside] < 3.85).all()
        assert (found.statistic[~inside] > 3.8).all()


def test_a_profile_that_the_runs_do_not_bound_is_open(synthetic):
    columns = synthetic(budgets=12)
    floorless = 400 / columns["params"] ** 0.3 + 900 / columns["tokens"] ** 0.35
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(len(floorless)))
    done = fit(read_runs(columns | {"loss": floorless * noise}), profiles=("E",))
    low, high = done.profiles["E"].to_json()["interval"]
    assert low is None and 0 < high < floorless.min()


def test_residuals_are_drawn_by_run_and_not_by_group(synthetic):
    runs = read_runs(synthetic())
    with pytest.raises(ValueError, match="resampling residuals has no groups"):
        fit(runs, bootstrap=10, resampling="residuals", group="model")
    with pytest.raises(ValueError, match="resampling: wanted cases or residuals, got 'runs'"):
        fit(runs, bootstrap=10, resampling="runs")


def test_what_cannot_be_profiled_is_refused(synthetic):
    with pytest.raises(ValueError, match="no free parameter 'E' to profile"):
        fit(read_runs(synthetic()), fix={"E": 1.0}, profiles=("E",))
