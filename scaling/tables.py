"""The tables of a report: the laws, the best use of compute, the forecasts. Each returns HTML."""

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np

from scaling.fit import Fit
from scaling.plots import scientific
from scaling.study import HEADLINE, Study, quantity

MANY = 16  # rows, and a table is folded


def laws(study: Study) -> str:
    """Every law with its parameters, and what speaks for them."""
    blocks = []
    for done in study.fits.values():
        said = _said(done)
        blocks.append(
            f"<h3>{escape(done.law.equation)}</h3><p class='quiet'>{escape(done.law.source)}. "
            f"{done.n_runs} runs, {objective(done)} = {done.objective:.4g}.</p>"
            + said
            + _table(
                ("parameter", "value", "95 % interval", "standard error"),
                (_parameter(done, name) for name in done.law.names),
                quiet=bool(said),
            )
            + f"<p class='quiet'>{_certificate(done)}</p>"
        )
    return (
        "<section><h2>The laws, fitted to all runs</h2><p>Natural units: loss in nats per token, "
        "counts in parameters and tokens. Coefficients depend on those units and trade against "
        "their exponents; exponents and predictions do not. Intervals and standard errors are "
        f"those of {draws(study)} refits to resampled runs. Where other values fit as well, "
        "none is given; where a fit has a warning, all of its numbers are grey.</p>"
        + "".join(blocks)
        + "</section>"
    )


def _said(done: Fit) -> str:
    """The fit's own warnings; those of its runs stand at the top of the page."""
    own = (text for text in done.warnings if text.startswith(f"{done.law.name}:"))
    return "".join(f"<p class='lost'>{escape(sentence(text))}</p>" for text in own)


def _parameter(done: Fit, name: str) -> tuple[str, ...]:
    known = name not in done.certificate["not_identified"]
    span, error = done.intervals.get(name), done.standard_errors.get(name)
    spread = (
        f"{_number(span[0])} to {_number(span[1])}" if span else "—",
        _number(error) if error is not None else "—",
    )
    if known:
        return escape(name), _number(done.parameters[name]), *spread
    muted = (f"<span class='quiet'>{text}</span>" for text in spread)
    return escape(name), "<span class='lost'>not determined</span>", *muted


def draws(study: Study) -> int:
    """How many replicates are behind the intervals."""
    done = study.fits.get(HEADLINE) or study.forecast_fits[HEADLINE]
    return len(next(iter(done.draws.values()), ()))


def objective(done: Fit) -> str:
    """What the fit minimised."""
    kind = {
        "huber": f"Huber loss (delta {done.delta:g})" if done.delta else "",
        "l1": "absolute",
        "mse": "squares",
    }
    return f"sum of {kind[done.loss]} on {'loss' if done.linear else 'log loss'}"


def _certificate(done: Fit) -> str:
    c = done.certificate
    gap = c["runner_up_gap"]
    next_best = (
        "no other optimum was found"
        if gap is None
        else f"the next optimum is worse by {_percent(gap)}"
    )
    bound = f" At a bound: {', '.join(c['at_bound'])}." if c["at_bound"] else ""
    return (
        f"Certificate: relative gradient {c['relative_gradient']:.0e}; {c['starts_at_optimum']} of "
        f"{c['starts']} starts (of {c['screened']} screened) reached this optimum; {next_best}."
        f"{bound}"
    )


def exponents(study: Study) -> str:
    """The exponent of N* by approach and FLOP convention."""
    if not study.exponents:
        return ""
    rows = (
        (escape(r["approach"]), escape(r["convention"]), f"{r['a']:.3f}", _span(r["interval"]))
        for r in study.exponents
    )
    return (
        "<section><h2>How the best size grows with compute</h2><p>N* = G C<sup>a</sup>, by "
        "Chinchilla's three approaches, and again under other ways to count FLOPs: the convention "
        "moves the exponent as much as the physics does, so compare exponents only within one.</p>"
        + _table(("approach", "FLOPs and N", "a", "95 % interval"), rows)
        + _bias(study)
        + "</section>"
    )


def _bias(study: Study) -> str:
    if study.isoflop_bias is None:
        return ""
    return (
        "<p class='quiet'>Approach 2's own bias: of noise-free runs of Chinchilla's fitted law, at "
        f"these sizes and budgets, its a is {study.isoflop_bias['a']:+.3f} off, and its N* at ten "
        f"times the largest budget {study.isoflop_bias['params']:+.1%}.</p>"
    )


def optimal(study: Study) -> str:
    """The best model for the largest run's FLOPs and beyond, by Chinchilla's law."""
    done = study.fits.get(HEADLINE)
    budgets = done.to_json(draws=False)["optimal"] if done else []
    if not done or not budgets:
        return ""

    def cell(row: dict[str, Any], name: str, form: Any) -> str:
        span = row["intervals"].get(name)
        spread = f"<br><span class='quiet'>{' to '.join(map(form, span))}</span>" if span else ""
        return form(row[name]) + spread

    rows = (
        (
            f"{scientific(row['flops'])}<br><span class='quiet'>"
            f"{row['flops'] / budgets[0]['flops']:.3g} &times; the largest run</span>",
            cell(row, "params", quantity),
            cell(row, "tokens", quantity),
            f"{row['tokens'] / row['params']:.3g}",
            cell(row, "loss", "{:.3f}".format),
        )
        for row in budgets
    )
    said = _said(done)
    return (
        "<section><h2>The best model for a budget</h2><p>Where Chinchilla's law, fitted to all "
        "runs, has its least loss at each compute, with 95 % intervals of the law's mean (a single "
        "run scatters about it). FLOPs are counted as those of the runs: "
        f"{escape(done.flops_convention)}. The first row is within reach of the runs; the others "
        f"hold only if the law does.</p>{said}"
        + _table(
            ("training FLOPs", "parameters N*", "tokens D*", "D* / N*", "loss"),
            rows,
            quiet=bool(said),
        )
        + "</section>"
    )


def forecasts(study: Study) -> str:
    """Every held-out run by every law, and how they did together."""
    scores, rows = [], []
    for law, told in study.forecasts.items():
        errors, inside = np.array([f.error for f in told]), sum(f.inside for f in told)
        scores.append(
            (
                escape(law),
                f"{len(told)}",
                f"{100 * np.abs(errors).mean():.2f}&nbsp;%",
                f"{100 * errors.mean():+.2f}&nbsp;%",
                f"{inside} of {len(told)}",
            )
        )
        for f in told:
            rows.append(
                (
                    escape(f.law),
                    quantity(f.params),
                    quantity(f.tokens),
                    f"{f.predicted:.4f}",
                    f"{f.low:.4f} to {f.high:.4f}",
                    f"{f.measured:.4f}",
                    f"{100 * f.error:+.2f}&nbsp;%",
                    "yes" if f.inside else "no",
                )
            )
    head = ("law", "params", "tokens", "predicted", "95 % interval", "measured", "error", "inside")
    every = _table(head, rows)
    if len(rows) > MANY:
        every = f"<details><summary>All {len(rows)} predictions</summary>{every}</details>"
    return (
        "<section><h2>Every held-out run</h2><p>Of honest 95 % intervals about 19 in 20 hold what "
        "is measured, though runs of one size or one training miss together. A bias of one sign "
        "means that the law bends where it was not looked at.</p>"
        + _table(("law", "runs", "mean error", "bias", "inside the interval"), scores)
        + f"{every}</section>"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], *, quiet: bool = False) -> str:
    """A table that scrolls sideways where it must; cells are HTML."""
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    look = " class='quiet'" if quiet else ""
    return (
        f"<div class='scroll'><table{look}><thead><tr>{titles}</tr></thead><tbody>{body}</tbody>"
        "</table></div>"
    )


def sentence(text: str) -> str:
    """With a capital, unless it begins with a law's name, and a full stop."""
    first, _, _ = text.partition(" ")
    start = text if first.endswith(":") else text[:1].upper() + text[1:]  # "kaplan_nd: ..." stays
    return start + ("" if text.endswith(".") else ".")


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}&nbsp;&times;&nbsp;10<sup>{int(exponent)}</sup>"


def _percent(value: float) -> str:
    return f"{100 * value:.2g}&nbsp;%" if value < 0.995 else f"{value + 1:.2g} times this"


def _span(interval: Any) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "—"
