"""What must not matter, does not: order, repetition, units, integers and a run that failed."""

import functools

import numpy as np
import pytest

from scaling.fit import fit
from scaling.laws import LAWS
from scaling.runs import read_runs

# How each parameter of a law changes when N, D and FLOPs are counted in larger units n, d and c.
RESCALED = {
    "kaplan_n": lambda p, n, d, c: {"X_c": p["X_c"] / n},
    "kaplan_d": lambda p, n, d, c: {"X_c": p["X_c"] / d},
    "kaplan_c": lambda p, n, d, c: {"X_c": p["X_c"] / c},
    "kaplan_nd": lambda p, n, d, c: {"N_c": p["N_c"] / n, "D_c": p["D_c"] / d},
    "chinchilla": lambda p, n, d, c: {
        "A": p["A"] / n ** p["alpha"],
        "B": p["B"] / d ** p["beta"],
    },
    "chinchilla_tied": lambda p, n, d, c: {
        "A": p["A"] / n ** p["alpha"],
        "B": p["B"] / d ** p["alpha"],
    },
    "overtraining": lambda p, n, d, c: {"a": p["a"] * n ** p["b"], "c": p["c"] * d ** p["b"]},
    "saturating": lambda p, n, d, c: {"X_c": p["X_c"] / c},
}


@pytest.fixture(scope="module")
def columns(synthetic):
    return {name: np.asarray(values) for name, values in synthetic(seed=3).items()}


@pytest.fixture(scope="module")
def plain(columns):
    """The fit of a law to the runs as they are."""
    return functools.cache(lambda law: fit(read_runs(columns), law))


def shuffled(columns):
    order = np.random.default_rng(1).permutation(len(columns["loss"]))
    return {name: values[order] for name, values in columns.items()}


def duplicated(columns):
    twice = {name: np.concatenate([values, values]) for name, values in columns.items()}
    worse = np.concatenate([columns["loss"], columns["loss"] + 0.1])
    return twice | {"loss": worse}


def integers(columns):
    whole = {name: columns[name].astype(np.int64) for name in ("params", "tokens")}
    return columns | whole | {"flops": 6.5 * columns["params"] * columns["tokens"]}


def with_failures(columns):
    extra = {"params": [1e5] * 2, "tokens": [1e6] * 2, "loss": [np.nan, np.inf]}
    return {
        name: np.concatenate([values, np.asarray(extra.get(name, values[:2]))])
        for name, values in columns.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("change", [shuffled, duplicated, integers, with_failures])
@pytest.mark.parametrize("law", RESCALED)
def test_what_carries_no_information_changes_nothing(columns, plain, law, change):
    changed = fit(read_runs(change(columns)), law)
    assert changed.n_runs == plain(law).n_runs == 35
    assert changed.parameters == pytest.approx(plain(law).parameters, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("law", RESCALED)
def test_units_rescale_what_has_units_and_nothing_else(columns, plain, law):
    n, d = 1e6, 1e9
    c = n * d
    scaled = {"params": n, "tokens": d, "flops": c}
    runs = read_runs(columns)
    plain = plain(law)
    changed = fit(read_runs(columns | {k: columns[k] / unit for k, unit in scaled.items()}), law)
    expected = plain.parameters | RESCALED[law](plain.parameters, n, d, c)
    for name, value in expected.items():
        # A coefficient is raised to the power of units: exponents' last digits become its sixth.
        tolerance = 1e-6 if value == plain.parameters[name] else 1e-4
        assert changed.parameters[name] == pytest.approx(value, rel=tolerance)
    at = {name: np.array([2.0, 30.0]) * runs[name].max() for name in LAWS[law].columns}
    there = {name: values / scaled[name] for name, values in at.items()}
    np.testing.assert_allclose(changed.predict(**there).loss, plain.predict(**at).loss, rtol=1e-6)
    if plain.has_optimum:
        one, two = plain.optimal(1e16), changed.optimal(1e16 / c)
        assert two.params * n == pytest.approx(one.params, rel=1e-6)
        assert two.tokens * d == pytest.approx(one.tokens, rel=1e-6)
