"""A study forecasts before it looks, says what it saw, and its report stands on its own."""

import json
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest

from scaling.plots import figures, to_svg
from scaling.plots.laws import exponents, ridge
from scaling.report import QUESTIONS, _checklist, write_report
from scaling.runs import read_runs
from scaling.study import _comparable, _hold_out, quantity, study, unbeaten
from scaling.tables import laws, optimal


def curves_of(columns):
    """Made-up training curves that end where the runs do."""
    rows = {name: [] for name in ("run_id", "step", "tokens", "flops", "loss")}
    for run, d, c, loss in zip(
        *(columns[k] for k in ("run_id", "tokens", "flops", "loss")), strict=True
    ):
        for part in (0.25, 0.5, 1.0):
            values = (run, int(100 * part), int(d * part), c * part, loss + 1 - part)
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
    return rows


@pytest.fixture(scope="module")
def done(synthetic):
    import pyarrow as pa

    columns = synthetic()
    return study(read_runs(columns), pa.table(curves_of(columns)), bootstrap=32)


def test_the_largest_run_and_all_of_its_size_are_held_out(done):
    params = done.runs["params"]
    assert (done.held == (params == params.max())).all()
    assert done.headline.flops == done.runs["flops"].max()
    assert done.forecast_fits["chinchilla"].n_runs == 30


def test_the_forecast_does_not_depend_on_what_was_held_out(done, synthetic):
    columns = synthetic()
    largest = np.asarray(columns["params"]) == max(columns["params"])
    spoiled = columns | {"loss": np.where(largest, 1.7 * columns["loss"], columns["loss"])}
    again = study(read_runs(spoiled), bootstrap=32).headline
    assert (again.predicted, again.low, again.high) == (
        done.headline.predicted,
        done.headline.low,
        done.headline.high,
    )
    assert not again.inside


def test_the_forecast_of_a_true_law_is_inside_its_interval(done):
    assert all(f.inside for f in done.forecasts["chinchilla"])
    assert abs(done.headline.error) < 0.01
    assert done.headline.low < done.headline.predicted < done.headline.high


def test_all_laws_and_approaches_are_there_with_intervals(done, synthetic):
    assert set(done.fits) == {"kaplan_n", "kaplan_d", "kaplan_nd", "chinchilla"}
    assert set(done.frontiers) == {"envelope", "isoflop"}
    rows = [row for row in done.exponents if row["headline"]]
    assert len(rows) == 3 and all(row["interval"] for row in rows)
    assert {row["convention"] for row in done.exponents} == {
        "unstated",
        "6ND",
        "6ND without embeddings",
    }
    parametric = next(r for r in rows if "parametric" in r["approach"])
    assert parametric["a"] == pytest.approx(0.36 / 0.63, abs=0.05)


def test_json_is_plain_and_the_same_every_time(done, synthetic):
    text = json.dumps(done.to_json(), allow_nan=False)
    assert json.dumps(study(read_runs(synthetic()), bootstrap=32).to_json()) == text
    assert {"headline", "holdout", "laws", "approaches", "exponents", "warnings"} <= set(
        json.loads(text)
    )


def test_the_summary_sets_predicted_beside_measured(done):
    text = "\n".join(done.lines())
    assert f"{done.headline.predicted:.4f}" in text and f"{done.headline.measured:.4f}" in text
    assert "95 % interval" in text and "inside the interval" in text


def test_undecayed_runs_are_left_out(synthetic):
    columns = synthetic()
    decayed = [i % 5 != 0 for i in range(len(columns["loss"]))]
    kept = _comparable(read_runs(columns | {"decayed": decayed}))
    assert len(kept) == sum(decayed)
    assert kept.dropped == (("learning rate not decayed", 7),)
    for same in ([True] * 35, [False] * 35):
        assert len(_comparable(read_runs(columns | {"decayed": same}))) == 35


def test_an_expression_can_name_the_holdout(synthetic):
    runs = read_runs(synthetic())
    held, why = _hold_out(runs, "tokens > 5e6")
    assert (held == (runs["tokens"] > 5e6)).all()
    assert why.startswith("all 7 runs: tokens > 5e6; the largest has 2.3 times")


def test_few_sizes_hold_out_the_largest_runs_only(synthetic):
    runs = read_runs(synthetic(sizes=3))
    held, why = _hold_out(runs, None)
    assert (held == (runs["flops"] > runs["flops"].max() / 2)).all()
    assert "fewer than 3 sizes" in why


def test_a_holdout_must_leave_some_runs(synthetic):
    with pytest.raises(ValueError, match="names 35 of 35 runs"):
        study(read_runs(synthetic()), holdout="tokens > 0")


def test_unbeaten_runs_are_those_that_nothing_smaller_beats():
    runs = read_runs(
        {"params": [1, 1, 2, 3, 4], "tokens": [1, 2, 1, 1, 1], "loss": [5.0, 4.0, 4.5, 3.0, 3.5]}
    )
    assert runs["loss"][unbeaten(runs, "params")].tolist() == [4.0, 3.0]


@pytest.fixture(scope="module")
def page(done, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(
        path, done, title="A <sweep>", checklist={"seeds": "one & only"}, provenance={"jax": "x"}
    )
    return path.read_text()


def test_the_report_needs_nothing_but_itself(page):
    assert "<script" not in page and "@import" not in page
    outside = re.findall(r"""(?:src|href)=["'](?!#)[^"']*|url\((?!#)[^)]*""", page)
    assert outside == []
    assert "name='viewport'" in page and "prefers-color-scheme: dark" in page


def test_the_report_leads_with_predicted_against_measured(page, done):
    assert page.index(f"{done.headline.predicted:.3f}") < page.index("<figure>")
    assert page.index(f"{done.headline.measured:.3f}") < page.index("<figure>")
    assert "Inside the interval" in page


def test_the_report_escapes_and_balances_its_tags(page):
    assert "A &lt;sweep&gt;" in page and "one &amp; only" in page

    class Balance(HTMLParser):
        stack: tuple = ()

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br"):
                self.stack = (*self.stack, tag)

        def handle_endtag(self, tag):
            assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
            self.stack = self.stack[:-1]

    parser = Balance()
    parser.feed(page)
    assert parser.stack == ()


def test_ids_are_unique_on_the_page(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


FITTED = {"kaplan_n", "kaplan_d", "contours", "predictions", "exponents", "ridge"}


@pytest.fixture(scope="module")
def made(done):
    return {name: figure for name, (figure, _) in figures(done).items()}


def refitted(done, **changes):
    """The study, with its final Chinchilla fit changed."""
    return replace(
        done, fits=done.fits | {"chinchilla": replace(done.fits["chinchilla"], **changes)}
    )


def test_the_report_has_a_figure_and_a_caption_for_each_law(page, made):
    assert set(made) == FITTED | {
        *("forecast", "curves", "isoflop", "envelope", "allocation", "residuals")
    }
    assert page.count("<figure>") == page.count("<svg ") == page.count("<figcaption>") == len(made)


def test_a_figure_is_left_out_where_its_fit_is_missing(done):
    assert set(figures(replace(done, fits={}, frontiers={}))) == {"forecast", "curves", "residuals"}
    undrawn = set(figures(refitted(done, draws={}, intervals={})))
    assert {"contours", "predictions"} <= undrawn and not {"exponents", "ridge"} & undrawn


def test_figures_are_the_same_to_the_byte(done, made):
    again = {name: to_svg(figure) for name, (figure, _) in figures(done).items()}
    assert again == {name: to_svg(figure) for name, figure in made.items()}
    assert all("viewBox" in svg and "<dc:date>" not in svg for svg in again.values())


def test_figures_are_small_however_many_the_draws(done, made):
    draws = {k: np.tile(v, 100) for k, v in done.fits["chinchilla"].draws.items()}
    crowded = refitted(done, draws=draws)
    for figure in (*made.values(), exponents(crowded), ridge(crowded)):
        assert len(to_svg(figure)) < 100_000


def test_the_frontier_over_the_contours_is_the_optimum(done, made):
    axes = made["contours"].axes[0]
    line = next(line for line in axes.lines if line.get_label() == "frontier")
    flops, params = line.get_data()
    assert params == pytest.approx(done.fits["chinchilla"].optimal(flops).params)


def test_the_leftmost_point_of_a_contour_is_on_the_frontier(done, made):
    from matplotlib.contour import QuadContourSet

    axes, fit = made["contours"].axes[0], done.fits["chinchilla"]
    drawn = next(c for c in axes.collections if isinstance(c, QuadContourSet))
    left, right = axes.get_xlim()
    levels = 0
    for level, path in zip(drawn.levels, drawn.get_paths(), strict=True):
        flops = path.vertices[:, 0].min()
        if 1.05 * left < flops < right / 1.05:
            assert fit.optimal(flops).loss == pytest.approx(level, rel=2e-3)
            levels += 1
    assert levels >= 3


def test_predictions_go_a_hundred_times_beyond_the_runs(done, made):
    axes, largest = made["predictions"].axes[0], done.runs["flops"].max()
    ends = [max(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"]
    assert ends == [pytest.approx(100 * largest)]


def test_what_is_not_determined_is_no_value(done):
    fit = done.fits["chinchilla"]
    value = f"<td>{fit.parameters['E']:.4g}</td>"
    lost = refitted(
        done,
        certificate=fit.certificate | {"not_identified": ["E"]},
        warnings=("chinchilla: these runs do not determine E",),
    )
    assert value in laws(done) and "not determined" not in laws(done).split("E + A")[1]
    told = laws(lost).split("E + A")[1]
    assert value not in told and "not determined" in told
    assert "<table class='quiet'>" in told and "runs do not determine E." in told
    assert "runs do not determine E." in optimal(lost)


def test_the_table_of_budgets_is_what_the_json_holds(page, done):
    budgets = done.fits["chinchilla"].to_json()["optimal"]
    assert len(budgets) == 3
    for row in budgets:
        low, high = row["intervals"]["params"]
        assert f"{quantity(row['params'])}<br>" in page and f"{row['loss']:.3f}<br>" in page
        assert f"{quantity(low)} to {quantity(high)}" in page


def test_what_nobody_recorded_is_shown_as_such():
    assert _checklist({}).count("not recorded") == len(QUESTIONS)
    some = _checklist({"seeds": "one", "weather": "fine"})
    assert some.count("not recorded") == len(QUESTIONS) - 1
    assert "weather" in some


def test_the_report_says_how_the_laws_were_fitted(page, done):
    assert "How the laws were fitted" in page
    assert "Huber loss (delta 0.001) on log loss" in page
    assert "percentiles of 32 refits" in page
    assert page.count(escape(done.held_why)) == 2
