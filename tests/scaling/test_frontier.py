"""Approaches 1 and 2 find the exponents: published ones to the digit, synthetic ones by theory."""

import numpy as np
import pytest

from scaling.envelope import fit_envelope, lower_hull
from scaling.fit import fit
from scaling.isoflop import bias, fit_isoflop
from scaling.runs import read_runs

A, B, E, ALPHA, BETA = 400.0, 2000.0, 1.8, 0.34, 0.36


def grid(budgets, sizes, off=0.0):
    """An isoFLOP grid, exact or with budgets `off` by that part, from Chinchilla's law."""
    c, n = (v.ravel() for v in np.meshgrid(budgets, sizes, indexing="ij"))
    c = c * np.exp(off * np.sin(np.arange(len(c))))
    d = c / (6 * n)
    return {"params": n, "tokens": d, "flops": c, "loss": E + A / n**ALPHA + B / d**BETA}


def theory(c):
    """The compute-optimal size of the law above."""
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return g * (c / 6) ** (BETA / (ALPHA + BETA))


def test_the_envelope_of_the_gemstones_is_the_published_line(published):
    fitted = fit_envelope(published("gemstones_hot_477.csv"))
    got = fitted.parameters
    assert len(fitted.flops) == 21
    assert got["a"] == pytest.approx(0.4993802, abs=1e-6)
    assert np.log(got["params_coefficient"]) == pytest.approx(-2.8451077, abs=1e-6)
    assert got["b"] == pytest.approx(0.4809888, abs=1e-6)
    assert np.log(got["tokens_coefficient"]) == pytest.approx(1.8963208, abs=1e-6)


def test_the_convention_of_flops_moves_the_envelope_of_the_gemstones(published):
    runs = published("gemstones_hot_477.csv", flops=None)
    assert runs.flops_convention == "6ND"
    assert fit_envelope(runs).parameters["a"] == pytest.approx(0.53840, abs=1e-5)


def test_the_hull_keeps_only_points_that_nothing_cheaper_beats():
    flops = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    loss = np.array([8.0, 4.0, 3.9, 2.0, 2.5])
    assert lower_hull(flops, loss).tolist() == [0, 1, 3]


@pytest.mark.parametrize(("method", "off"), [("parabola", 0.0), ("parabola", 0.2), ("akima", 0.0)])
def test_isoflop_finds_the_exponent_on_exact_and_on_inexact_grids(method, off):
    budgets = np.geomspace(1e18, 1e21, 6)
    sizes = theory(1e18) * np.geomspace(0.15, 300, 24)
    table = grid(budgets, sizes, off)
    near = np.abs(np.log(table["params"] / theory(table["flops"]))) < 1.6
    runs = read_runs({name: values[near] for name, values in table.items()})
    fitted = fit_isoflop(runs, method=method, bootstrap=50)
    a = BETA / (ALPHA + BETA)
    assert fitted.parameters["a"] == pytest.approx(a, abs=0.01)
    assert fitted.parameters["a"] + fitted.parameters["b"] == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(fitted.params, theory(fitted.flops), rtol=0.08)
    low, high = fitted.intervals["a"]
    assert low <= fitted.parameters["a"] <= high


def test_the_vertex_is_found_between_the_sizes_that_were_tried():
    sizes = theory(1e19) * np.array([0.3, 0.8, 2.0, 5.0])
    fitted = fit_isoflop(read_runs(grid([1e19, 1.2e19], sizes)))
    best_tried = sizes[np.argmin(np.abs(np.log(sizes / theory(1e19))))]
    miss = abs(np.log(fitted.params[0] / theory(1e19)))
    assert miss < 0.15 < abs(np.log(best_tried / theory(1e19)))


def test_a_curve_through_all_points_is_not_bent_by_a_lopsided_grid():
    sizes = theory(1e19) * np.array([0.5, 0.8, 1.2, 2, 4, 10, 30, 100])
    runs = read_runs(grid([1e19, 1.2e19], sizes))
    stiff, free = (fit_isoflop(runs, method=method).params for method in ("parabola", "akima"))
    assert np.abs(np.log(free[0] / theory(1e19))) < 0.05 < np.abs(np.log(stiff[0] / theory(1e19)))


def test_the_bias_of_parabolas_is_what_noise_free_runs_show_of_it():
    table = grid(np.geomspace(1e18, 1e21, 5), theory(3e19) * np.geomspace(0.02, 20, 12))
    runs = read_runs(table)
    told = bias(runs, fit(runs, "chinchilla"))
    found = fit_isoflop(runs).parameters  # these runs have no noise: it is all bias
    assert told["a"] == pytest.approx(found["a"] - BETA / (ALPHA + BETA), abs=1e-4)
    far = found["params_coefficient"] * 1e22 ** found["a"]
    assert told["params"] == pytest.approx(far / theory(1e22) - 1, abs=1e-3)
    assert abs(told["params"]) > 0.02


def test_akima_says_that_it_wants_a_grid():
    sizes, budgets = theory(1e19) * np.geomspace(0.3, 4, 8), np.geomspace(8e18, 2e19, 5)
    table = read_runs(grid(budgets, sizes, off=0.2))
    assert any("no isoFLOP grid" in text for text in fit_isoflop(table, method="akima").warnings)
    assert not fit_isoflop(table).warnings


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="wanted parabola or akima, got 'spline'"):
        fit_isoflop(read_runs(grid([1e18, 1e19], theory(1e18) * np.ones(1))), method="spline")


def test_a_budget_whose_minimum_is_at_the_edge_is_dropped_by_name():
    budgets = np.array([1e18, 4e18, 3e22])
    sizes = theory(2e18) * np.geomspace(0.2, 5, 7)
    fitted = fit_isoflop(read_runs(grid(budgets, sizes)))
    assert len(fitted.flops) == 2
    assert fitted.dropped == (("budget 3.00e+22: its least loss is at its largest size", 1),)


def test_too_few_budgets_are_refused_in_one_line():
    with pytest.raises(ValueError, match="isoflop: 0 budgets with 4 sizes") as error:
        fit_isoflop(read_runs(grid([1e18, 1e19], theory(1e18) * np.array([0.5, 1, 2]))))
    assert "\n" not in str(error.value)


def test_too_short_a_frontier_is_refused_in_one_line():
    table = {"params": [1e6, 2e6], "tokens": [1e7, 1e7], "loss": [3.0, 2.9]}
    with pytest.raises(ValueError, match="envelope: only 2 of 2 runs") as error:
        fit_envelope(read_runs(table))
    assert "\n" not in str(error.value)
