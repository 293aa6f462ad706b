"""What the laws say of the runs, what they miss, and how well their parameters are known."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scaling.fit import Fit
from scaling.laws import evaluate
from scaling.plots.style import (
    ACCENT,
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
    note,
    size_colours,
    spread_labels,
)
from scaling.study import HEADLINE, Study, quantity, unbeaten

CLOUD = 400  # draws shown: enough to see a shape, few enough for a page


def forecast(study: Study) -> Figure:
    """Loss against tokens for each size, the law fitted without the held-out ones, and its band."""
    figure, axes = empty("training tokens", "loss, nats per token")
    colours, runs, held = size_colours(study), study.runs, study.held
    done = study.forecast_fits[HEADLINE]
    d, fitted = runs["tokens"], runs["params"][~held]
    span = np.geomspace(d.min() / 1.15, d.max() * 1.15, 80)
    dots(axes, d[~held], runs["loss"][~held], fitted, colours, 4.5)
    for size in named(fitted):
        line = done.predict(params=size, tokens=span).loss
        axes.plot(span, line, color=colours[size], lw=1.1, alpha=0.75)
        end_label(axes, span[-1], line[-1], quantity(size), colours[size])
    ahead = study.forecasts[HEADLINE]
    for size in named(np.array([f.params for f in ahead])):
        interval = 0.95 if done.draws else None
        best = done.predict(params=size, tokens=span, interval=interval, noise=True)
        axes.plot(span, best.loss, color=ACCENT, lw=1.4)
        if interval:
            band(axes, span, (best.low, best.high), ACCENT)
        mine = [f for f in ahead if f.params == size]
        diamonds(axes, [f.tokens for f in mine], [f.measured for f in mine])
        end_label(axes, span[-1], best.loss[-1], f"{quantity(size)} held", ACCENT)
    log(axes, "xy")
    return spread_labels(figure)


def power_law(study: Study, law: str) -> Figure:
    """Kaplan's L(N) or L(D): the runs on the frontier of that column, and the fitted line."""
    done, runs, colours = study.fits[law], study.runs, size_colours(study)
    small = law == "kaplan_n" and "params_no_embed" in runs
    small = small and bool(np.isfinite(runs["params_no_embed"]).all())
    column = {"kaplan_n": "params_no_embed" if small else "params", "kaplan_d": "tokens"}[law]
    words = {
        "params_no_embed": "parameters without embeddings",
        "params": "parameters",
        "tokens": "training tokens",
    }
    figure, axes = empty(words[column], "loss, nats per token")
    x, loss, size, used = runs[column], runs["loss"], runs["params"], unbeaten(runs, column)
    dots(axes, x[~used], loss[~used], size[~used], colours, 4.0, c="none", alpha=0.6)
    rim = {"edgecolors": PAPER, "linewidths": 0.6}
    dots(axes, x[used], loss[used], size[used], colours, 6.0, zorder=3, **rim)
    span = np.geomspace(x.min() / 1.3, x.max() * 1.3, 60)
    x_law: dict[str, Any] = {done.law.columns[0]: span}
    best = done.predict(interval=0.95 if done.draws else None, **x_law)
    axes.plot(span, best.loss, color=MATHS, lw=1.5)
    if best.low is not None:
        band(axes, span, (best.low, best.high), MATHS)
    note(axes, f"slope -{done.parameters['alpha']:.3f}", MATHS)
    log(axes, "xy")
    return figure


def residuals(study: Study) -> Figure:
    """Predicted against measured, in percent, of the forecast's fit."""
    figure, axes = empty("training FLOPs", "predicted minus measured, % of loss")
    runs, fitted = study.runs, ~study.held
    done = study.forecast_fits[HEADLINE]
    predicted = evaluate(done.law, done.parameters, {k: runs[k] for k in done.law.columns})
    error = 100 * (predicted / runs["loss"] - 1)
    size = runs["params"][fitted]
    dots(axes, runs["flops"][fitted], error[fitted], size, size_colours(study), 5.0)
    for f in study.forecasts[HEADLINE]:
        low, high = 100 * (f.low / f.measured - 1), 100 * (f.high / f.measured - 1)
        axes.plot([f.flops] * 2, [low, high], color=ACCENT, lw=1.3, alpha=0.6)
        diamonds(axes, f.flops, 100 * f.error)
    axes.axhline(0, color=MUTED, lw=0.9)
    log(axes, "x")
    return figure


def exponents(study: Study) -> Figure:
    """The bootstrap cloud of the Chinchilla exponents."""
    figure, axes = empty("alpha, the exponent of parameters", "beta, the exponent of tokens")
    _cloud(axes, study.fits[HEADLINE], "alpha", "beta")
    ends = np.array([0.0, 5.0])
    axes.plot(ends, ends, color=MUTED, lw=0.9, ls=":")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure


def ridge(study: Study) -> Figure:
    """The bootstrap cloud of A and its exponent, and of the term that they form."""
    figure, axes = empty("alpha, the exponent of parameters", "A, the coefficient")
    done = study.fits[HEADLINE]
    _cloud(axes, done, "alpha", "A")
    log(axes, "y")
    size = float(np.exp(np.log(study.runs["params"]).mean()))
    term = done.draws["A"] * size ** -done.draws["alpha"]
    low, high = np.quantile(term, [0.025, 0.975])
    spread = " to ".join(map(quantity, done.intervals["A"]))
    said = f"A: {spread}\nA / N^alpha at N = {quantity(size)}:\n{low:.2g} to {high:.2g}"
    note(axes, said, MUTED, 0.03)
    return figure


def _cloud(axes: Axes, done: Fit, x: str, y: str) -> None:
    """Draws of two parameters, the estimate, and the 95 % interval of each as an arm."""
    for name, limit in ((x, axes.set_xlim), (y, axes.set_ylim)):
        # A stray replicate must not squeeze the cloud into a corner.
        logarithmic = name == "A"
        values = np.log(done.draws[name]) if logarithmic else done.draws[name]
        low, high = np.quantile(values, [0.005, 0.995])
        ends = np.array([low - 0.25 * (high - low), high + 0.25 * (high - low)])
        limit(*(np.exp(ends) if logarithmic else ends))
    axes.plot(
        done.draws[x][:CLOUD],
        done.draws[y][:CLOUD],
        "o",
        color=MATHS,
        ms=2.6,
        alpha=0.35,
        mec="none",
    )
    at = done.parameters[x], done.parameters[y]
    axes.plot(done.intervals[x], [at[1]] * 2, color=ACCENT, lw=1.4)
    axes.plot([at[0]] * 2, done.intervals[y], color=ACCENT, lw=1.4)
    axes.plot(*at, "o", color=ACCENT, ms=5, mec=PAPER, mew=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
