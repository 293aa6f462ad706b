"""The best use of compute: by the envelope, by isoFLOP parabolas, and by Chinchilla's law."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scaling.fit import FAR, Fit
from scaling.plots.style import (
    ACCENT,
    CROWD,
    INK,
    MATHS,
    MUTED,
    PAPER,
    band,
    diamonds,
    dots,
    empty,
    end_label,
    log,
    named,
    scientific,
    size_colours,
    spread_labels,
)
from scaling.study import HEADLINE, Study, quantity

BUDGETS = 40  # along a frontier: the same everywhere, so that one compiled program serves all


def isoflop(study: Study) -> Figure:
    """The isoFLOP parabolas and their vertices."""
    figure, axes = empty("parameters", "loss, nats per token")
    colours = size_colours(study)
    for budget in study.frontiers["isoflop"].budgets:
        n = np.log(budget.params)
        span = np.linspace(n[0] - 0.15, n[-1] + 0.15, 60)
        curve = np.polyval(budget.coefficients, span)
        style = "--" if budget.problem else "-"
        axes.plot(np.exp(span), curve, style, color=MUTED, lw=1.0, zorder=1)
        dots(axes, budget.params, budget.loss, budget.params, colours, 4.5)
        if not budget.problem:
            axes.plot(
                budget.params_best, budget.loss_best, "D", color=ACCENT, ms=5.5, mec=PAPER, mew=0.6
            )
        end_label(axes, np.exp(span[-1]), curve[-1], scientific(budget.flops), MUTED)
    log(axes, "x")
    return spread_labels(figure)


def envelope(study: Study) -> Figure:
    """Loss against compute, and the lower envelope."""
    figure, axes = empty("training FLOPs", "loss, nats per token")
    runs, front, colours = study.runs, study.frontiers["envelope"], size_colours(study)
    labelled = named(runs["params"])
    for size, colour in colours.items():
        mine = runs["params"] == size
        c, loss = runs["flops"][mine], runs["loss"][mine]
        if len(colours) <= CROWD:
            axes.plot(c, loss, color=colour, lw=0.8)
        if size in labelled:
            end_label(axes, c[-1], loss[-1], quantity(size), colour)  # runs are by rising FLOPs
    dots(axes, runs["flops"], runs["loss"], runs["params"], colours, 4.0)
    axes.plot(front.flops, front.loss, color=MATHS, lw=2.0, alpha=0.7)
    axes.plot(front.flops, front.loss, "o", mfc="none", mec=MATHS, ms=8.5, mew=1.3)
    log(axes, "xy")
    return spread_labels(figure)


def contours(study: Study) -> Figure:
    """Where Chinchilla's law predicts equal losses, over FLOPs and parameters, and its frontier."""
    figure, axes = empty("training FLOPs", "parameters")
    runs, held, done = study.runs, study.held, study.fits[HEADLINE]
    c, n = runs["flops"], runs["params"]
    right, top = c.max() * 4, n.max() * 3  # room for the labels, clear of the runs
    span = np.geomspace(c.min() / 2, right, BUDGETS)
    best = done.optimal(span, interval=0.95 if done.draws else None)
    low, high = best.intervals.get("params", (best.params, best.params))
    axes.set_xlim(span[0], right)
    axes.set_ylim(n.min() / 2, top)
    log(axes, "xy")
    _isolosses(axes, done, runs["loss"], float(high[-1]))
    band(axes, span, (low, high), INK)
    axes.plot(span, best.params, color=INK, lw=1.6, label="frontier")
    dots(axes, c[~held], n[~held], n[~held], size_colours(study), 4.2)
    diamonds(axes, c[held], n[held])
    inside = np.flatnonzero((n.min() / 2 <= best.params) & (best.params <= top))
    if len(inside):
        end_label(axes, span[inside[-1]], best.params[inside[-1]], "best size", INK)
    return figure


def _isolosses(axes: Axes, done: Fit, losses: np.ndarray, above: float) -> None:
    """Contours at round losses, each labelled where it leaves at the top or, above, on the right.

    Along the top edge and then down the right one to the frontier the loss only falls, so on that
    way each contour is met once, and no label covers another that is far enough along it.
    """
    k, p = done.cost
    (left, right), (bottom, top) = np.log(axes.get_xlim()), np.log(axes.get_ylim())

    def loss(c: np.ndarray, n: np.ndarray) -> np.ndarray:
        return np.asarray(done.predict(params=np.exp(n), tokens=np.exp(c - p * n) / k).loss)

    x, y = np.linspace(left, right, 90), np.linspace(bottom, top, 90)
    grid = np.meshgrid(x, y)
    values = loss(*grid)
    levels = MaxNLocator(10, steps=[1, 2, 2.5, 5, 10]).tick_values(values.min(), losses.max())
    levels = levels[(values.min() < levels) & (levels < 1.1 * losses.max())]
    axes.contour(*np.exp(grid), values, levels=levels, colors=MUTED, linewidths=0.8, alpha=0.8)
    edge, corner = right - 0.05 * (right - left), top - 0.04 * (top - bottom)
    c = np.r_[np.linspace(left, edge, 200), np.full(200, edge)]
    n = np.r_[np.full(200, corner), np.linspace(corner, min(np.log(above), corner), 200)]
    along = loss(c, n)
    on = along < np.minimum.accumulate(np.r_[np.inf, along[:-1]])
    last = np.array([-np.inf, 0.0])
    for level in levels[(along[on].min() < levels) & (levels < along.max())]:
        at = [float(np.exp(np.interp(-level, -along[on], v[on]))) for v in (c, n)]
        place = axes.transData.transform(at) * 72 / axes.figure.dpi
        if np.abs(place - last).max() > 25:
            axes.text(
                at[0],
                at[1],
                f"{level:g}",
                color=MUTED,
                fontsize=8.5,
                ha="center",
                va="center",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
            )
            last = place


def allocation(study: Study) -> Figure:
    """N* against compute by the three approaches."""
    figure, axes = empty("training FLOPs", "compute-optimal parameters")
    top = study.runs["flops"].max()
    span = np.geomspace(study.runs["flops"].min(), top * 30, BUDGETS)
    looks = {"envelope": (MATHS, "s", "1 envelope"), "isoflop": (ACCENT, "D", "2 isoFLOP")}
    for name, front in study.frontiers.items():
        colour, marker, words = looks[name]
        p = front.parameters
        line = p["params_coefficient"] * span ** p["a"]
        axes.plot(span, line, color=colour, lw=1.3)
        axes.plot(front.flops, front.params, marker, color=colour, ms=4.5, mec=PAPER, mew=0.5)
        if front.draws:
            many = front.draws["params_coefficient"][:, None] * span ** front.draws["a"][:, None]
            band(axes, span, np.quantile(many, [0.025, 0.975], axis=0), colour, 0.10)
        end_label(axes, span[-1], line[-1], words, colour)
    if HEADLINE in study.fits:
        done = study.fits[HEADLINE]
        best = done.optimal(span, interval=0.95 if done.draws else None)
        axes.plot(span, best.params, color=INK, lw=1.5)
        if best.intervals:
            band(axes, span, best.intervals["params"], INK, 0.12)
        end_label(axes, span[-1], best.params[-1], "3 parametric", INK)
    axes.axvline(top, color=MUTED, lw=0.9, ls=":")
    log(axes, "xy")
    return spread_labels(figure)


def predictions(study: Study) -> Figure:
    """Loss at the best size against compute, far beyond the runs, with the band of the law."""
    figure, axes = empty("training FLOPs", "loss, nats per token")
    runs, held, done = study.runs, study.held, study.fits[HEADLINE]
    c, loss = runs["flops"], runs["loss"]
    span = np.geomspace(c.min(), FAR * c.max(), BUDGETS)
    best = done.optimal(span, interval=0.95 if done.draws else None)
    beyond = span >= c.max()
    axes.plot(span[~beyond], best.loss[~beyond], color=INK, lw=1.6)
    axes.plot(span[beyond], best.loss[beyond], color=INK, lw=1.6, ls="--")
    if best.intervals:
        band(axes, span, best.intervals["loss"], INK)
    dots(axes, c[~held], loss[~held], runs["params"][~held], size_colours(study), 4.2)
    diamonds(axes, c[held], loss[held])
    axes.axvline(c.max(), color=MUTED, lw=0.9, ls=":")
    log(axes, "xy")
    axes.annotate(
        "extrapolated",
        (c.max(), 0.97),
        (5, 0),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        color=MUTED,
        fontsize=9,
        va="top",
    )
    end_label(axes, span[-1], best.loss[-1], f"{best.loss[-1]:.3g}", INK)
    return figure
