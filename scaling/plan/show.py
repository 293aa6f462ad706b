"""A plan on the terminal and on disk."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lineage_jax.train.metrics import write_json
from scaling.fit import Fit, read_fit
from scaling.plan.grid import PlanOptions, make_plan
from scaling.plan.next_run import NextRun, next_runs
from scaling.plan.plan import Plan
from scaling.study import quantity


def plan_file(options: PlanOptions) -> list[Any]:
    """Plans, writes the plan, and gives back what to show: tables and lines.

    Raises:
      ValueError: an option, or the fit, is not what a plan needs.
      OSError: the fit cannot be read, or the plan written.
    """
    fitted = None if options.fit is None else read_fit(options.fit)
    plan = make_plan(options, fitted)
    told = plan.to_json()
    shown = [size_table(plan), "", run_table(plan), "", *total_lines(plan), "", *plan.assumptions]
    target = None
    if fitted and options.target:
        best = fitted.optimal(options.target)
        target = (float(best.params), float(best.tokens))
    elif options.target_params and options.target_tokens:
        target = (options.target_params, options.target_tokens)
    if fitted and target:
        runs = next_runs(fitted, target, plan)
        first, last = next_lines(fitted, target, runs)
        shown += ["", first, "", next_table(runs), "", last]
        cautions = [f"Caution: {text}." for text in fitted.cautions(options.target or 0.0)]
        shown += [text for text in cautions if text not in plan.assumptions]
        told["next"] = [run.to_json() for run in runs]
    write_json(options.json, told)
    return [*shown, "", f"Written to {options.json}; train it with `lineage sweep {options.json}`"]


def size_table(plan: Plan) -> Table:
    """The sizes, for a terminal."""
    table = _table(
        "layers x width", "heads", "params", "no embed.", "FLOPs/token", "first rate", "runs"
    )
    for size in plan.sizes:
        shape = size.shape
        table.add_row(
            shape.name.replace("x", " x "),
            f"{shape.num_heads} x {shape.embed_dim // shape.num_heads}",
            quantity(shape.params(plan.vocab_size, plan.seq_len)),
            quantity(shape.non_embedding),
            quantity(shape.flops_per_token(plan.vocab_size, plan.seq_len)),
            f"{size.learning_rate:.2g}",
            str(len(size.steps)),
        )
    return table


def run_table(plan: Plan) -> Table:
    """The runs, budget by budget, for a terminal."""
    names = ["size", "tokens", "D/N", "steps", "FLOPs", "6ND", "trained"]
    names += ["time"] if plan.hardware else []
    names += ["cost"] if plan.price is not None else []
    table, grid = _table(*names), plan.grid()
    for run, after in zip(grid, [*grid[1:], None], strict=True):
        n = run.shape.params(plan.vocab_size, plan.seq_len)
        cells = [
            run.shape.name,
            quantity(run.tokens),
            quantity(run.tokens / n),
            quantity(run.steps),
            *(_short(work) for work in (run.flops, run.six_nd, run.trained_flops)),
        ]
        cells += [] if run.seconds is None else [duration(run.seconds)]
        cells += [] if run.cost is None else [f"{run.cost:,.2f}"]
        table.add_row(*cells, end_section=after is None or after.budget != run.budget)
    return table


def total_lines(plan: Plan) -> list[str]:
    """The sums, for a terminal."""
    totals = plan.totals()
    line = f"In all {totals['runs']} runs of {len(plan.sizes)} sizes, "
    line += f"{totals['trained_flops']:.3g} FLOPs trained"
    if plan.hardware:
        line += f", {duration(totals['seconds'])} on {plan.chips} x {plan.hardware}"
    if plan.price is not None:
        line += f", {totals['cost']:,.2f} at {plan.price:g} a chip hour"
    return [line]


def next_lines(
    fitted: Fit, target: tuple[float, float], runs: Sequence[NextRun]
) -> tuple[str, str]:
    """What is said before and after the table of next runs."""
    n, d = target
    loss = float(fitted.predict(params=n, tokens=d).loss)
    cheap = max(runs, key=lambda run: run.gain / run.flops)
    return (
        f"Next run, by {fitted.law.name}: the loss of {quantity(n)} parameters on {quantity(d)} "
        f"tokens, {loss:.4f}, has a 95 % interval {runs[0].now:.4f} wide; expected after one run "
        "more:",
        f"Most for its FLOPs: {cheap.shape.name} on {quantity(cheap.tokens)} tokens, "
        f"{_short(cheap.flops)} FLOPs, to {cheap.after:.4f}.",
    )


def next_table(runs: Sequence[NextRun], number: int = 5) -> Table:
    """The first few of the next runs."""
    table = _table("size", "params", "tokens", "FLOPs", "width now", "after", "less variance")
    for run in runs[:number]:
        table.add_row(
            run.shape.name,
            quantity(run.params),
            quantity(run.tokens),
            _short(run.flops),
            f"{run.now:.4f}",
            f"{run.after:.4f}",
            f"{run.gain:.1%}",
        )
    return table


def duration(seconds: float | None) -> str:
    """A time for people: 3.2 s, 14 min, 2.5 h, 3.1 d."""
    value, name = seconds or 0.0, "s"
    for unit, longer in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if value >= unit:
            value, name = value / unit, longer
            break
    return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"


def _short(work: int | float) -> str:
    """FLOPs in seven letters."""
    return f"{work:.2e}".replace("e+", "e")


def _table(first: str, *names: str) -> Table:
    """A table whose columns but the first are numbers, narrow enough for 80 letters."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table
