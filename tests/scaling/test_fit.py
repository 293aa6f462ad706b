"""Fits recover the truth, reproduce the published numbers, and admit what they do not know."""

import numpy as np
import pytest

from scaling.fit import fit
from scaling.laws import LAWS, evaluate
from scaling.runs import read_runs

TRUTHS = {
    "kaplan_n": {"X_c": 8.8e13, "alpha": 0.076},
    "kaplan_d": {"X_c": 5.4e13, "alpha": 0.095},
    "kaplan_nd": {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
    "kaplan_c": {"X_c": 1.6e7 * 8.64e19, "alpha": 0.057},
    "chinchilla": {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
    "chinchilla_tied": {"A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.353},
    "chinchilla_fixed_e": {"A": 482.01, "B": 2085.43, "E": 1.69, "alpha": 0.3478, "beta": 0.3658},
    "overtraining": {"a": 166.2, "b": -0.2729, "c": 366.7, "E": 1.8366},
    "data_constrained": {
        **{"A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.353, "beta": 0.353},
        **{"R_N": 5.31, "R_D": 15.4},
    },
    "saturating": {"E": 1.7, "X_c": 2e19, "alpha": 0.16},
    "broken_power_law": {
        **{"E": 1.2, "b": 40.0, "c_0": 0.08, "c_1": 0.1, "d_1": 3e19, "f_1": 0.4},
    },
    "lr_annealing": {"E": 2.6, "A": 0.42, "alpha": 0.5, "C": 0.45},
    "downstream_sigmoid": {"a": 0.55, "b": 0.25, "k": 4.0, "L_0": 2.4},
}


def exact(law, truth, count=60, seed=0):
    """Noise-free runs of a law at sizes and tokens of published sweeps, some with repetition."""
    rng = np.random.default_rng(seed)
    x = {"params": 10 ** rng.uniform(7.5, 10.2, count), "tokens": 10 ** rng.uniform(9, 11.5, count)}
    x["flops"] = 6 * x["params"] * x["tokens"]
    x["unique_tokens"] = x["tokens"] / 10 ** rng.uniform(-0.3, 1.8, count)
    if law == "downstream_sigmoid":
        x["loss"] = 1.9 + 400 / x["params"] ** 0.34 + 400 / x["tokens"] ** 0.3
    if law == "lr_annealing":
        x |= schedules()
        x |= LAWS[law].derive(x)
    return x | {LAWS[law].target: evaluate(LAWS[law], truth, {k: x[k] for k in LAWS[law].columns})}


def schedules(steps=3000, points=30):
    """run_id, step and learning_rate of a constant, a cosine and a WSD schedule, 1000 x 2e-4."""
    step = np.linspace(0, steps, points + 1).round()[1:]
    part = step / steps
    shapes = {
        "constant": np.ones(points),
        "cosine": 0.5 + 0.5 * np.cos(np.pi * part),
        "wsd": np.clip((1 - part) / 0.2, 0.0, 1.0),
    }
    warm = np.minimum(step / 200, 1.0)
    return {
        "run_id": np.repeat(list(shapes), points),
        "step": np.tile(step, len(shapes)),
        "learning_rate": np.concatenate([0.2 * warm * shape for shape in shapes.values()]),
        **dict.fromkeys(("params", "tokens", "flops"), np.ones(points * len(shapes))),
        "unique_tokens": np.ones(points * len(shapes)),
    }


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_noise_free_runs_give_back_the_generating_parameters(law, loss):
    given = {name: TRUTHS[law][name] for name in LAWS[law].given}
    runs = read_runs(exact(law, TRUTHS[law]), duplicates="keep")
    fitted = fit(runs, law, loss=loss, fix=given)
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


def test_five_small_runs_of_the_overtraining_data_predict_the_two_large_ones(published):
    runs = published("gadre_overtrain.csv", where="dataset=='rpj'", loss="loss_c4_val", flops=None)
    multiple, smallest = runs["tok_mult"], runs["params"] == runs["params"].min()
    large = runs["params"] > 1e9
    five = runs.take(((multiple == 20) & ~large) | ((multiple == 320) & smallest))
    fitted = fit(five, "overtraining", loss="mse", linear=True)
    truth = {"a": 166.211, "b": -0.272851, "c": 366.687, "E": 1.836648}
    assert len(five) == 5
    assert fitted.parameters == pytest.approx(truth, rel=1e-3)
    found = runs.take(((multiple == 640) & (runs["params"] < 2e9) & large) | (runs["params"] > 2e9))
    predicted = fitted.predict(params=found["params"], tokens=found["tokens"]).loss
    errors = dict(zip(found["params"] > 2e9, np.abs(predicted / found["loss"] - 1), strict=True))
    assert 100 * errors[False] == pytest.approx(0.7103, abs=0.002)  # 1.4 B parameters, M = 640
    assert 100 * errors[True] == pytest.approx(0.7320, abs=0.002)  # 6.9 B, M = 20


def test_without_repetition_the_data_constrained_law_is_chinchilla():
    x = exact("chinchilla", TRUTHS["chinchilla"])
    x["params"] = x["params"] / 1e3  # below what is compute-optimal for the tokens
    columns = {name: x[name] for name in ("params", "tokens")}
    once = columns | {"unique_tokens": x["tokens"]}
    truth = TRUTHS["chinchilla"]
    found = evaluate(LAWS["data_constrained"], truth | {"R_N": 5.3, "R_D": 15.4}, once)
    np.testing.assert_allclose(found, evaluate(LAWS["chinchilla"], truth, columns), rtol=1e-12)


def test_what_repetition_is_worth_ends_at_its_limit():
    truth, law = TRUTHS["data_constrained"], LAWS["data_constrained"]
    x = {"params": np.float64(1e7), "unique_tokens": np.float64(1e9)}
    endless = evaluate(law, truth, x | {"tokens": np.float64(1e15)})
    fresh = {"params": np.float64(1e7), "tokens": np.float64(1e9 * (1 + truth["R_D"]))}
    plain = {name: truth[name] for name in LAWS["chinchilla"].names}
    # More parameters than 1e9 tokens want, 5e7, would decay too.
    np.testing.assert_allclose(endless, evaluate(LAWS["chinchilla"], plain, fresh), rtol=1e-9)


def test_a_law_whose_parameter_must_be_given_says_so(synthetic):
    with pytest.raises(ValueError, match="chinchilla_fixed_e wants E fixed"):
        fit(read_runs(synthetic()), "chinchilla_fixed_e")


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
        ({"params": "size"}, "needs a column 'size'"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(synthetic, options, wanted):
    if options.get("holdout") == "flops>2e12":
        options = {"holdout": np.arange(35) >= 5}
    with pytest.raises(ValueError, match=wanted) as error:
        fit(read_runs(synthetic()), **options)
    assert "\n" not in str(error.value)


def test_a_law_of_curves_is_held_out_on_their_ends():
    x = exact("lr_annealing", TRUTHS["lr_annealing"])
    runs = read_runs(x, duplicates="keep", needs=("run_id", "step", "learning_rate", "loss"))
    done = fit(runs, "lr_annealing", holdout="step > 2000", group="run_id", bootstrap=20)
    assert done.parameters == pytest.approx(TRUTHS["lr_annealing"], rel=1e-4)
    assert done.holdout["mean_abs_relative_error"] < 1e-5
