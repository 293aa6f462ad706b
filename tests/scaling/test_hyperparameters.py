"""The best learning rate and batch size come back from runs that were made with them."""

import numpy as np
import pytest

from scaling.hyperparameters import fit_hyperparameters
from scaling.runs import read_runs

TRUTH = {
    **{"lr_coefficient": 1.79, "lr_params_exponent": -0.713, "lr_tokens_exponent": 0.307},
    **{"batch_coefficient": 0.58, "batch_tokens_exponent": 0.571},
}


def grid(noise=0.0, batches=5, octaves=4):
    """Runs over rates and batch sizes, a factor of two apart, around the best of each (N, D)."""
    rng, rows = np.random.default_rng(0), []
    for n in np.geomspace(6e7, 1e9, 4):
        for d in np.geomspace(2e9, 1e11, 4):
            t = TRUTH
            rate = t["lr_coefficient"] * n ** t["lr_params_exponent"] * d ** t["lr_tokens_exponent"]
            batch = t["batch_coefficient"] * d ** t["batch_tokens_exponent"]
            off = rng.uniform(-0.4, 0.4)
            for i in range(-octaves, octaves + 1):
                for j in range(batches) if batches > 1 else (2,):
                    x, y = i + off, j - 2 + off
                    loss = 2.0 + 0.02 * x**2 + 0.01 * y**2 + noise * rng.standard_normal()
                    rows.append((n, d, rate * 2.0**x, round(batch * 2.0**y), loss))
    names = ("params", "tokens", "learning_rate", "batch_tokens", "loss")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def test_noise_free_runs_give_back_the_generating_laws():
    done = fit_hyperparameters(read_runs(grid(), duplicates="keep"))
    assert done.parameters == pytest.approx(TRUTH, rel=1e-4)  # batch sizes are whole tokens
    best = done.predict(params=1e9, tokens=1e11)
    assert best["learning_rate"] == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307, rel=1e-3)
    assert best["batch_tokens"] == pytest.approx(0.58 * 1e11**0.571, rel=1e-3)


def test_noise_leaves_the_truth_inside_the_intervals():
    done = fit_hyperparameters(read_runs(grid(0.002), duplicates="keep"), bootstrap=500)
    for name in ("lr_params_exponent", "lr_tokens_exponent", "batch_tokens_exponent"):
        low, high = done.intervals[name]
        assert low < TRUTH[name] < high


def test_one_batch_size_gives_the_law_of_the_rate_alone():
    done = fit_hyperparameters(read_runs(grid(batches=1), duplicates="keep"))
    rate = {name: value for name, value in TRUTH.items() if name.startswith("lr")}
    assert done.parameters == pytest.approx(rate, rel=1e-4)


def test_a_best_rate_at_the_edge_of_those_tried_is_none():
    columns = {name: np.array(values) for name, values in grid(batches=1).items()}
    smallest = columns["params"] == columns["params"].min()
    best = columns["learning_rate"][smallest][np.argmin(columns["loss"][smallest])]
    kept = ~smallest | (columns["learning_rate"] >= best)
    done = fit_hyperparameters(
        read_runs({name: values[kept] for name, values in columns.items()}, duplicates="keep")
    )
    assert "lowest or the highest tried" in str(done.dropped)


def test_one_ratio_of_tokens_to_parameters_determines_one_exponent_and_says_so():
    columns = {name: np.array(values) for name, values in grid(batches=1).items()}
    columns |= {
        "tokens": 20 * columns["params"],
        "batch_tokens": np.full(len(columns["loss"]), 1e6),
    }
    done = fit_hyperparameters(read_runs(columns, duplicates="keep"))
    assert done.parameters["lr_tokens_exponent"] == 0
    assert any("do not determine lr_tokens_exponent" in text for text in done.warnings)


def test_too_few_settings_are_refused(synthetic):
    with pytest.raises(ValueError, match="needs a column 'learning_rate'"):
        fit_hyperparameters(read_runs(synthetic()))
    with pytest.raises(ValueError, match="3 are needed"):
        fit_hyperparameters(read_runs(synthetic() | {"learning_rate": np.full(35, 0.1)}))
