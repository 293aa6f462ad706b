"""Fits recover the truth, reproduce the published numbers, and admit what they do not know."""

import numpy as np
import pytest

from scaling.fit import evaluate, fit, resample
from scaling.laws import LAWS
from scaling.runs import read_runs

TRUTHS = {
    "kaplan_n": {"X_c": 8.8e13, "alpha": 0.076},
    "kaplan_d": {"X_c": 5.4e13, "alpha": 0.095},
    "kaplan_nd": {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
    "chinchilla": {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
}


def exact(law, truth, count=60, seed=0):
    """Noise-free runs of a law at sizes and tokens of published sweeps."""
    rng = np.random.default_rng(seed)
    x = {"params": 10 ** rng.uniform(7.5, 10.2, count), "tokens": 10 ** rng.uniform(9, 11.5, count)}
    return x | {"loss": evaluate(LAWS[law], truth, {k: x[k] for k in LAWS[law].columns})}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_noise_free_runs_give_back_the_generating_parameters(law, loss):
    fitted = fit(read_runs(exact(law, TRUTHS[law])), law, loss=loss)
    assert fitted.parameters == pytest.approx(TRUTHS[law], rel=1e-5)
    assert fitted.certificate["identified"]
    assert fitted.certificate["relative_gradient"] < 1e-4


def test_every_law_has_a_test_of_its_recovery():
    assert set(TRUTHS) == set(LAWS)


def test_the_huber_fit_of_the_chinchilla_data_is_the_published_optimum(published):
    runs = published("chinchilla_svg.csv", where="outlier_excluded==0")
    fitted = fit(runs, "chinchilla", delta=1e-3)
    got = fitted.parameters
    assert len(runs) == 240
    assert fitted.objective <= 1.018275e-3
    assert got["A"] == pytest.approx(477.826, rel=1e-3)
    assert got["B"] == pytest.approx(2143.417, rel=1e-3)
    assert got["E"] == pytest.approx(1.817218, rel=5e-5)
    assert got["alpha"] == pytest.approx(0.3473105, rel=2e-5)
    assert got["beta"] == pytest.approx(0.3671724, rel=2e-5)


def test_the_least_absolute_deviations_of_the_chinchilla_data_are_the_tuple_in_print(published):
    fitted = fit(published("chinchilla_svg.csv", where="outlier_excluded==0"), loss="l1")
    got = fitted.parameters
    assert fitted.objective == pytest.approx(1.12949465, rel=1e-6)
    assert got["A"] == pytest.approx(482.006, rel=2e-3)
    assert got["B"] == pytest.approx(2085.436, rel=2e-3)
    assert got["E"] == pytest.approx(1.816864, rel=1e-4)
    assert got["alpha"] == pytest.approx(0.347813, rel=1e-4)
    assert got["beta"] == pytest.approx(0.365854, rel=1e-4)


@pytest.mark.slow
def test_the_bootstrap_of_the_chinchilla_data_has_the_published_spread(published):
    runs = published("chinchilla_svg.csv", where="outlier_excluded==0")
    fitted = fit(runs, "chinchilla", bootstrap=4000, seed=0)
    errors = {"A": 124.52, "B": 1293.28, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
    assert fitted.standard_errors == pytest.approx(errors, rel=0.08)
    spans = {
        "A": (285, 744),
        "B": (1042, 5810),
        "E": (1.769, 1.871),
        "alpha": (0.317, 0.373),
        "beta": (0.331, 0.415),
    }
    for name, span in spans.items():
        assert fitted.intervals[name] == pytest.approx(span, rel=0.08)


def test_units_rescale_the_coefficients_and_nothing_else(synthetic):
    columns = synthetic()
    scaled = columns | {
        "params": np.asarray(columns["params"]) / 1e6,
        "tokens": np.asarray(columns["tokens"]) / 1e9,
    }
    one, two = fit(read_runs(columns)), fit(read_runs(scaled))
    a, b = one.parameters, two.parameters
    for name in ("E", "alpha", "beta"):
        assert b[name] == pytest.approx(a[name], rel=1e-6)
    assert b["A"] == pytest.approx(a["A"] / 1e6 ** a["alpha"], rel=1e-5)
    assert b["B"] == pytest.approx(a["B"] / 1e9 ** a["beta"], rel=1e-5)
    here = one.predict(params=1e8, tokens=1e10).loss
    assert two.predict(params=1e2, tokens=1e1).loss == pytest.approx(here, rel=1e-6)
    best, same = one.optimal(1e16), two.optimal(1e16)
    assert same.params * 1e6 == pytest.approx(best.params, rel=1e-6)


def test_shuffled_rows_give_the_same_fit_to_the_bit(synthetic):
    columns = synthetic()
    order = np.random.default_rng(1).permutation(len(columns["loss"]))
    shuffled = {name: np.asarray(values)[order] for name, values in columns.items()}
    one = fit(read_runs(columns), bootstrap=20)
    two = fit(read_runs(shuffled), bootstrap=20)
    assert one.parameters == two.parameters
    assert one.intervals == two.intervals


def test_the_optimum_is_the_closed_form_of_chinchilla(synthetic):
    runs = read_runs(synthetic(), flops=None)
    fitted = fit(runs)
    p = fitted.parameters
    a = p["beta"] / (p["alpha"] + p["beta"])
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    flops = np.array([1e14, 1e18])
    best = fitted.optimal(flops)
    np.testing.assert_allclose(best.params, g * (flops / 6) ** a, rtol=1e-9)
    np.testing.assert_allclose(6 * best.params * best.tokens, flops, rtol=1e-12)


def test_recorded_flops_set_the_price_of_the_optimum(synthetic):
    fitted = fit(read_runs(synthetic()))  # 6.5 N D
    best = fitted.optimal(1e16)
    assert fitted.cost == pytest.approx((6.5, 1.0))
    assert 6.5 * best.params * best.tokens == pytest.approx(1e16, rel=1e-9)


def test_a_fixed_parameter_stays_and_the_others_do_no_worse_elsewhere(synthetic):
    runs = read_runs(synthetic())
    free, held = fit(runs), fit(runs, fix={"alpha": 0.35, "E": 1.3})
    assert (held.parameters["alpha"], held.parameters["E"]) == (0.35, 1.3)
    assert held.objective > free.objective
    assert held.certificate["free"] == ["A", "B", "beta"]
    for name in ("A", "B", "beta"):
        for factor in (0.999, 1.001):
            moved = held.parameters | {name: held.parameters[name] * factor}
            assert fit(runs, fix=moved).objective > held.objective


def test_runs_of_one_size_do_not_determine_the_size_term(synthetic):
    columns = synthetic(budgets=12)
    one = np.asarray(columns["params"]) == columns["params"][0]
    runs = read_runs({name: np.asarray(v)[one] for name, v in columns.items()})
    certificate = fit(runs).certificate
    assert not certificate["identified"]
    assert {"A", "alpha"} & set(certificate["not_identified"])


def test_runs_without_a_floor_report_that_e_is_not_determined():
    x = exact("chinchilla", TRUTHS["chinchilla"])
    loss = 400 / x["params"] ** 0.2 + 900 / x["tokens"] ** 0.25
    rng = np.random.default_rng(0)
    runs = read_runs(x | {"loss": loss * np.exp(0.01 * rng.standard_normal(len(loss)))})
    fitted = fit(runs)
    assert "E" in fitted.certificate["not_identified"]
    assert any("E" in text for text in fitted.warnings)


def test_a_prediction_interval_covers_new_runs_and_a_mean_interval_the_law(synthetic):
    inside, covered = [], []
    for seed in range(5):
        fitted = fit(read_runs(synthetic(seed=seed)), bootstrap=64)
        fresh = read_runs(synthetic(seed=100 + seed))
        x = {"params": fresh["params"], "tokens": fresh["tokens"]}
        new = fitted.predict(**x, interval=0.95, noise=True)
        mean = fitted.predict(**x, interval=0.95)
        truth = read_runs(synthetic(noise=0.0))["loss"]
        inside.append(np.mean((new.low <= fresh["loss"]) & (fresh["loss"] <= new.high)))
        covered.append(np.mean((mean.low <= truth) & (truth <= mean.high)))
    assert 0.90 <= np.mean(inside) <= 0.99
    assert 0.85 <= np.mean(covered) <= 0.99


def test_held_out_runs_are_scored_and_do_not_touch_the_fit(synthetic):
    columns = synthetic()
    spoiled = columns | {
        "loss": np.where(np.asarray(columns["flops"]) > 1e13, 9.0, columns["loss"])
    }
    one = fit(read_runs(columns), holdout="flops>1e13", bootstrap=50)
    two = fit(read_runs(spoiled), holdout="flops>1e13", bootstrap=50)
    assert one.parameters == two.parameters
    assert one.holdout["mean_abs_relative_error"] < 0.02
    assert two.holdout["bias"] < -0.5 and two.holdout["coverage"] == 0.0


def test_a_group_is_resampled_whole():
    groups = np.array(["a", "a", "b", "c", "c", "c"])
    weights = resample(6, 50, 0, groups)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()


def test_json_holds_plain_numbers_under_the_agreed_names(synthetic):
    import json

    out = json.loads(
        json.dumps(fit(read_runs(synthetic()), bootstrap=30).to_json(), allow_nan=False)
    )
    assert {
        "law",
        "parameters",
        "objective",
        "loss",
        "delta",
        "n_runs",
        "dropped",
        "certificate",
    } <= set(out)
    assert {"intervals", "holdout", "optimal", "flops_convention", "warnings"} <= set(out)
    assert {"relative_gradient", "starts", "starts_at_optimum", "runner_up_gap"} <= set(
        out["certificate"]
    )
    assert {"at_bound", "identified"} <= set(out["certificate"])
    assert list(out["parameters"]) == ["A", "B", "E", "alpha", "beta"]
    assert {"flops", "params", "tokens", "loss", "intervals"} == set(out["optimal"][0])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"law": "chinchila"}, "no law 'chinchila': there are kaplan_n"),
        ({"loss": "huge"}, "wanted huber, l1 or mse"),
        ({"delta": 0.0}, "wanted a positive number"),
        ({"fix": {"gamma": 1.0}}, "no parameter 'gamma' to fix"),
        ({"holdout": "flops>1e30"}, "names none of the 35 runs"),
        ({"holdout": "flops>2e12"}, r"5 free parameters and needs more runs than that, got \d"),
        ({"params": "size"}, "no column 'size'"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(synthetic, options, wanted):
    if options.get("holdout") == "flops>2e12":
        options = {"holdout": np.arange(35) >= 5}
    with pytest.raises(ValueError, match=wanted) as error:
        fit(read_runs(synthetic()), **options)
    assert "\n" not in str(error.value)
