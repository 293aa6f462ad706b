"""A study forecasts before it looks, says what it saw, and its report stands on its own."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from scaling.plots import figures, to_svg
from scaling.report import QUESTIONS, _checklist, write_report
from scaling.runs import read_runs
from scaling.study import _comparable, _hold_out, study, unbeaten


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


def test_the_report_has_a_figure_and_a_caption_for_each_law(page, done):
    made = figures(done)
    assert {"forecast", "curves", "kaplan_n", "kaplan_d", "isoflop", "envelope"} <= set(made)
    assert {"allocation", "residuals", "exponents"} <= set(made)
    assert page.count("<figure>") == page.count("<svg ") == page.count("<figcaption>") == len(made)


def test_figures_are_the_same_to_the_byte(done):
    one, two = (to_svg(figures(done)["forecast"][0]) for _ in range(2))
    assert one == two
    assert "viewBox" in one and "<dc:date>" not in one


def test_a_table_of_someone_else_says_what_was_not_recorded():
    assert _checklist({}).count("not recorded") == len(QUESTIONS)
    assert "not recorded" not in _checklist({"seeds": "one"})
