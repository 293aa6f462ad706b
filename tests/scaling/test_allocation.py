"""The best model for some compute, and the best where it has to serve as well."""

import numpy as np
import pytest

from scaling.fit import fit, read_fit
from scaling.runs import read_runs


@pytest.fixture(scope="module")
def fitted(synthetic):
    return fit(read_runs(synthetic()), bootstrap=60)


def test_the_cheapest_model_to_serve_beats_every_other_that_is_as_good(fitted):
    flops, served = 1e16, 5e12
    best = fitted.optimal(flops, inference_tokens=served)
    plain = fitted.optimal(flops)
    assert best.loss == pytest.approx(plain.loss, rel=1e-9)
    assert best.params < plain.params and best.tokens > plain.tokens
    assert best.flops > flops
    p, (k, power) = fitted.parameters, fitted.cost
    assert best.flops == pytest.approx(k * best.params**power * best.tokens, rel=1e-9)
    assert best.inference_flops == pytest.approx(k * best.params**power * served / 3, rel=1e-9)
    # All models of equal loss, from Chinchilla's closed form.
    n = best.params * np.exp(np.linspace(-0.3, 0.3, 601))
    gap = best.loss - p["E"] - p["A"] / n ** p["alpha"]
    n, gap = n[gap > 0], gap[gap > 0]
    total = k * n**power * ((p["B"] / gap) ** (1 / p["beta"]) + served / 3)
    assert n[np.argmin(total)] == pytest.approx(best.params, rel=2e-3)
    assert total.min() >= (best.flops + best.inference_flops) * (1 - 1e-9)


def test_with_nothing_to_serve_it_is_the_compute_optimal_model(fitted):
    plain, served = fitted.optimal(1e16), fitted.optimal(1e16, inference_tokens=1e-3)
    assert served.params == pytest.approx(plain.params, rel=1e-4)
    assert plain.flops == pytest.approx(1e16, rel=1e-12)
    assert plain.inference_flops == 0


def test_the_more_is_served_the_smaller_the_model(fitted):
    sizes = [fitted.optimal(1e16, inference_tokens=t).params for t in (1e9, 1e11, 1e13)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_fit_that_was_written_answers_as_it_did(fitted, tmp_path):
    import json

    path = tmp_path / "fit.json"
    path.write_text(json.dumps(fitted.to_json()))
    again = read_fit(str(path))
    one, two = (f.optimal(1e17, interval=0.95, inference_tokens=1e12) for f in (fitted, again))
    assert two.params == one.params
    for name, span in one.intervals.items():
        assert two.intervals[name] == pytest.approx(span, rel=1e-6)
    one, two = (
        f.predict(params=1e7, tokens=1e9, interval=0.9, noise=True) for f in (fitted, again)
    )
    assert (two.low, two.high) == pytest.approx((one.low, one.high), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a fit"),
        ("[1]", "is not a fit"),
        ('{"law": "envelope"}', "is a fit of envelope: wanted one of kaplan_n"),
        ('{"laws": {}}', "is not a fit"),
    ],
)
def test_what_is_no_fit_is_refused(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_fit(str(tmp_path / "x.json"))


def test_an_answer_far_beyond_the_runs_says_so(fitted):
    assert not fitted.cautions(10 * fitted.flops_max)
    (said,) = fitted.cautions(1e4 * fitted.flops_max)
    assert "1e+04 times the largest run fitted" in said


def test_a_law_of_one_resource_divides_none(synthetic):
    done = fit(read_runs(synthetic()), "kaplan_n")
    with pytest.raises(ValueError, match="kaplan_n has no optimum"):
        done.optimal(1e16)
