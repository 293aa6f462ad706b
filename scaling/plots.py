"""Figures of a study, as matplotlib Figures and as SVG that is the same to the byte every time.

One colour per model size, the same in every figure, from a map whose lightness is ordered; what was
held out is always the accent. Labels stand at what they name. Figures are narrow, so that on a
phone they shrink little. In a page the colours become CSS variables and follow its theme.
"""

import io
import re
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from scaling.laws import evaluate
from scaling.study import HEADLINE, Study, quantity, unbeaten

INK, MUTED, FAINT, ACCENT, PAPER = "#1c2128", "#59636e", "#d5dae0", "#c2361c", "#fefefe"
DARK = {INK: "#e8ebef", MUTED: "#9aa4b0", FAINT: "#363d47", ACCENT: "#ff8062", PAPER: "#161a20"}
SIZE = (5.0, 3.7)  # inches
CROWD = 25  # more sizes than this, and lines that join the runs of each would be a thicket
MATHS = "#3a6ea5"  # second voice: fitted lines that belong to no size
DARK |= {MATHS: "#7fb2e8"}


def size_colours(study: Study) -> dict[float, str]:
    """A colour for each model size, dark to light by size."""
    sizes = np.unique(study.runs["params"])
    return dict(zip(map(float, sizes), _ramp(len(sizes), 0.0, 0.82), strict=True))


def theme(study: Study) -> dict[str, str]:
    """What each colour of the figures becomes on a dark page: {light: dark}, both hexadecimal."""
    light = size_colours(study).values()
    return DARK | dict(zip(light, _ramp(len(light), 0.33, 1.0), strict=True))


def _ramp(count: int, low: float, high: float) -> list[str]:
    ramp = matplotlib.colormaps["viridis"](np.linspace(low, high, count))
    return [matplotlib.colors.to_hex(colour) for colour in ramp]


def figures(study: Study) -> dict[str, tuple[Figure, str]]:
    """All figures that the study allows, in reading order: {name: (figure, how to read it)}."""
    made = {"forecast": forecast(study)}
    made["curves"] = loss_curves(study)
    for law in ("kaplan_n", "kaplan_d"):
        if law in study.fits:
            made[law] = power_law(study, law)
    if "isoflop" in study.frontiers:
        made["isoflop"] = isoflop(study)
    if "envelope" in study.frontiers:
        made["envelope"] = envelope(study)
    if study.frontiers or "chinchilla" in study.fits:
        made["allocation"] = allocation(study)
    made["residuals"] = residuals(study)
    if "chinchilla" in study.fits and study.fits["chinchilla"].draws:
        made["exponents"] = exponents(study)
    return {name: (figure, CAPTIONS[name]) for name, figure in made.items()}


CAPTIONS = {
    "forecast": (
        "The forecast. Dots are the runs that were fitted, one colour per model size; lines are "
        "the Chinchilla law fitted to them. The red band is the 95 % interval that it gave for "
        "the held-out size before that size was looked at; red diamonds are what was then "
        "measured. Diamonds inside the band: the law carries to the larger size."
    ),
    "curves": (
        "Loss while training. One colour per model size, smallest darkest; dots are the end "
        "points that the laws are fitted to, after the learning rate has decayed. A larger model "
        "should run below a smaller one; where it does not, it is undertrained or its learning "
        "rate is wrong. Training losses, averaged over twentieths of a factor of ten in tokens."
    ),
    "kaplan_n": (
        "Kaplan's L(N). Loss against parameters, fitted to the runs that no smaller model beats "
        "(filled). A straight line in these axes is a power law. Points that bend above it at the"
        " right are held back by data, not by size."
    ),
    "kaplan_d": (
        "Kaplan's L(D). Loss against training tokens, fitted to the runs that none with fewer "
        "tokens beats (filled). Points that bend above the line at the right are held back by "
        "size, not by data."
    ),
    "isoflop": (
        "Approach 2. Each parabola joins runs of equal compute, labelled in FLOPs; its vertex "
        "(red) is the best size for that compute. Vertices should move right as compute grows. "
        "Dashed: no minimum was bracketed among the sizes, and the budget is not used."
    ),
    "envelope": (
        "Approach 1. Every run against its compute. The line is the lower envelope; the runs on "
        "it (ringed) were the best use of their compute, and their sizes give the exponent."
    ),
    "allocation": (
        "The best size for a budget. How large a model should be for its compute, by the three "
        "approaches, with 95 % bands. Where the lines agree the answer does not depend on the "
        "method. Left of the dotted line is measured, right of it extrapolated."
    ),
    "residuals": (
        "What the law misses. Predicted minus measured, in percent of the loss, against compute. "
        "Dots were fitted; red diamonds were held out, with their 95 % intervals. A trend or a "
        "curve would mean that the law has the wrong form; scatter is noise between runs."
    ),
    "exponents": (
        "The bootstrap. Each dot is the pair of Chinchilla exponents refitted to one resampling "
        "of the runs; the cross is the fit. A small round cloud is well determined; a long one "
        "means that the two trade against each other. Above the diagonal, compute is better spent"
        " on parameters than on tokens; below it, on tokens."
    ),
}


def forecast(study: Study) -> Figure:
    """Loss against tokens for each size, the law fitted without the held-out ones, and its band."""
    figure, axes = _figure("training tokens", "loss, nats per token")
    colours, runs, held = size_colours(study), study.runs, study.held
    done = study.forecast_fits[HEADLINE]
    d = runs["tokens"]
    span = np.geomspace(d.min() / 1.15, d.max() * 1.15, 80)
    named = _named(runs["params"][~held])
    for size in np.unique(runs["params"][~held]):
        mine = ~held & (runs["params"] == size)
        axes.plot(d[mine], runs["loss"][mine], "o", color=colours[size], ms=4.5, mec="none")
        if size in named:
            x = {"params": np.full(80, size), "tokens": span}
            line = evaluate(done.law, done.parameters, x)
            axes.plot(span, line, color=colours[size], lw=1.1, alpha=0.75)
            _end_label(axes, span[-1], line[-1], quantity(size), colours[size])
    ahead = study.forecasts[HEADLINE]
    for size in _named(np.array([f.params for f in ahead])):
        interval = 0.95 if done.draws else None
        band = done.predict(params=size, tokens=span, interval=interval, noise=True)
        axes.plot(span, band.loss, color=ACCENT, lw=1.4)
        if interval:
            axes.fill_between(span, band.low, band.high, color=ACCENT, alpha=0.16, lw=0)
        mine = [f for f in ahead if f.params == size]
        axes.plot(
            [f.tokens for f in mine],
            [f.measured for f in mine],
            "D",
            mfc=PAPER,
            mec=ACCENT,
            ms=5.5,
            mew=1.5,
        )
        _end_label(axes, span[-1], band.loss[-1], f"{quantity(size)} held out", ACCENT)
    _log(axes, "xy")
    return _spread_labels(figure)


def loss_curves(study: Study) -> Figure:
    """Loss while training, one colour per size, with the end points that are fitted."""
    figure, axes = _figure("training tokens", "loss, nats per token")
    colours, runs = size_colours(study), study.runs
    if study.curves is not None:
        for size, tokens, loss in _trajectories(study):
            axes.plot(*_binned(tokens, loss), color=colours[size], lw=1.0, alpha=0.8)
    named = _named(runs["params"])
    for size, colour in colours.items():
        mine = runs["params"] == size
        tokens, loss = runs["tokens"][mine], runs["loss"][mine]
        if study.curves is None and len(colours) <= CROWD:
            axes.plot(tokens, loss, color=colour, lw=1.0, alpha=0.8)
        axes.plot(tokens, loss, "o", color=colour, mec=PAPER, mew=0.6, ms=5.5, zorder=3)
        if size in named:
            last = np.argmax(tokens)
            _end_label(axes, tokens[last], loss[last], quantity(size), colour)
    _log(axes, "xy")
    return _spread_labels(figure)


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
    figure, axes = _figure(words[column], "loss, nats per token")
    x, used = runs[column], unbeaten(runs, column)
    for size, colour in colours.items():
        mine = runs["params"] == size
        axes.plot(
            x[mine & ~used],
            runs["loss"][mine & ~used],
            "o",
            mfc="none",
            mec=colour,
            ms=4,
            alpha=0.6,
        )
        axes.plot(
            x[mine & used],
            runs["loss"][mine & used],
            "o",
            color=colour,
            ms=6,
            mec=PAPER,
            mew=0.6,
            zorder=3,
        )
    span = np.geomspace(x.min() / 1.3, x.max() * 1.3, 60)
    x_law: dict[str, Any] = {done.law.columns[0]: span}
    best = done.predict(interval=0.95 if done.draws else None, **x_law)
    axes.plot(span, best.loss, color=MATHS, lw=1.5)
    if best.low is not None:
        axes.fill_between(span, best.low, best.high, color=MATHS, alpha=0.16, lw=0)
    _note(axes, f"slope -{done.parameters['alpha']:.3f}", MATHS)
    _log(axes, "xy")
    return figure


def isoflop(study: Study) -> Figure:
    """The isoFLOP parabolas and their vertices."""
    figure, axes = _figure("parameters", "loss, nats per token")
    colours = size_colours(study)
    for budget in study.frontiers["isoflop"].budgets:
        n = np.log(budget.params)
        span = np.linspace(n[0] - 0.15, n[-1] + 0.15, 60)
        curve = np.polyval(budget.coefficients, span)
        style = "--" if budget.problem else "-"
        axes.plot(np.exp(span), curve, style, color=MUTED, lw=1.0, zorder=1)
        for size, loss in zip(budget.params, budget.loss, strict=True):
            axes.plot(size, loss, "o", color=colours.get(float(size), MUTED), ms=4.5, mec="none")
        if not budget.problem:
            axes.plot(
                budget.params_best, budget.loss_best, "D", color=ACCENT, ms=5.5, mec=PAPER, mew=0.6
            )
        _end_label(axes, np.exp(span[-1]), curve[-1], scientific(budget.flops), MUTED)
    _log(axes, "x")
    return _spread_labels(figure)


def envelope(study: Study) -> Figure:
    """Loss against compute, and the lower envelope."""
    figure, axes = _figure("training FLOPs", "loss, nats per token")
    runs, front = study.runs, study.frontiers["envelope"]
    named = _named(runs["params"])
    colours = size_colours(study)
    for size, colour in colours.items():
        mine = runs["params"] == size
        style = "-o" if len(colours) <= CROWD else "o"
        c, loss = runs["flops"][mine], runs["loss"][mine]
        axes.plot(c, loss, style, color=colour, lw=0.8, ms=4, mec="none")
        if size in named:
            _end_label(axes, c[-1], loss[-1], quantity(size), colour)  # runs are by rising FLOPs
    axes.plot(front.flops, front.loss, color=MATHS, lw=2.0, alpha=0.7)
    axes.plot(front.flops, front.loss, "o", mfc="none", mec=MATHS, ms=8.5, mew=1.3)
    _log(axes, "xy")
    return _spread_labels(figure)


def allocation(study: Study) -> Figure:
    """N* against compute by the three approaches."""
    figure, axes = _figure("training FLOPs", "compute-optimal parameters")
    top = study.runs["flops"].max()
    span = np.geomspace(study.runs["flops"].min(), top * 30, 40)
    looks = {"envelope": (MATHS, "s", "1 envelope"), "isoflop": (ACCENT, "D", "2 isoFLOP")}
    for name, front in study.frontiers.items():
        colour, marker, words = looks[name]
        p = front.parameters
        line = p["params_coefficient"] * span ** p["a"]
        axes.plot(span, line, color=colour, lw=1.3)
        axes.plot(front.flops, front.params, marker, color=colour, ms=4.5, mec=PAPER, mew=0.5)
        if front.draws:
            many = front.draws["params_coefficient"][:, None] * span ** front.draws["a"][:, None]
            low, high = np.quantile(many, [0.025, 0.975], axis=0)
            axes.fill_between(span, low, high, color=colour, alpha=0.10, lw=0)
        _end_label(axes, span[-1], line[-1], words, colour)
    if "chinchilla" in study.fits:
        done = study.fits["chinchilla"]
        best = done.optimal(span, interval=0.95 if done.draws else None)
        axes.plot(span, best.params, color=INK, lw=1.5)
        if best.intervals:
            axes.fill_between(span, *best.intervals["params"], color=INK, alpha=0.12, lw=0)
        _end_label(axes, span[-1], best.params[-1], "3 parametric", INK)
    axes.axvline(top, color=MUTED, lw=0.9, ls=":")
    _log(axes, "xy")
    return _spread_labels(figure)


def residuals(study: Study) -> Figure:
    """Predicted against measured, in percent, of the forecast's fit."""
    figure, axes = _figure("training FLOPs", "predicted minus measured, % of loss")
    runs, held, colours = study.runs, study.held, size_colours(study)
    done = study.forecast_fits[HEADLINE]
    predicted = evaluate(done.law, done.parameters, {k: runs[k] for k in done.law.columns})
    error = 100 * (predicted / runs["loss"] - 1)
    for size in np.unique(runs["params"][~held]):
        mine = ~held & (runs["params"] == size)
        axes.plot(runs["flops"][mine], error[mine], "o", color=colours[size], ms=5, mec="none")
    for f in study.forecasts[HEADLINE]:
        low, high = 100 * (f.low / f.measured - 1), 100 * (f.high / f.measured - 1)
        axes.plot([f.flops] * 2, [low, high], color=ACCENT, lw=1.3, alpha=0.6)
        axes.plot(f.flops, 100 * f.error, "D", mfc=PAPER, mec=ACCENT, ms=5.5, mew=1.5)
    axes.axhline(0, color=MUTED, lw=0.9)
    _log(axes, "x")
    return figure


def exponents(study: Study) -> Figure:
    """The bootstrap cloud of the Chinchilla exponents."""
    figure, axes = _figure("alpha, the exponent of parameters", "beta, the exponent of tokens")
    done = study.fits["chinchilla"]
    alpha, beta = done.draws["alpha"][:800], done.draws["beta"][:800]
    # A stray replicate must not squeeze the cloud into a corner.
    for values, limit in ((alpha, axes.set_xlim), (beta, axes.set_ylim)):
        low, high = np.quantile(values, [0.005, 0.995])
        limit(low - 0.25 * (high - low), high + 0.25 * (high - low))
    axes.plot(alpha, beta, "o", color=MATHS, ms=2.6, alpha=0.35, mec="none")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    ends = np.array([0.0, 5.0])
    axes.plot(ends, ends, color=MUTED, lw=0.9, ls=":")
    axes.plot(done.parameters["alpha"], done.parameters["beta"], "+", color=ACCENT, ms=12, mew=2)
    return figure


SVG: Any = {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.family": "sans-serif"}


def write_svg(figure: Figure, path: Any) -> None:
    """A figure as a file of its own, on white; the same bytes for the same figure."""
    with matplotlib.rc_context(SVG):
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def to_svg(figure: Figure, *, prefix: str = "", colours: dict[str, str] | None = None) -> str:
    """A figure as an <svg> element: deterministic, scalable, without XML header.

    Args:
      figure: from this module.
      prefix: of all ids, so that several figures can share a page.
      colours: hexadecimal colours to be replaced, such as by var(--ink).
    """
    out = io.StringIO()
    with matplotlib.rc_context(SVG):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg ([^>]*?)(height|width)="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) (height|width)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for light, replacement in (colours or {}).items():
        svg = svg.replace(light, replacement)
    return svg


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure with quiet axes; labels may hang over its right edge by a fifth."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_axes((0.15, 0.14, 0.69, 0.82))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelcolor=MUTED, labelsize=9, width=0.6)
    axes.grid(True, color=FAINT, lw=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=INK, fontsize=10)
    axes.set_ylabel(y, color=INK, fontsize=10)
    return figure, axes


def _log(axes: Axes, which: str) -> None:
    """Log axes with ticks that people read: 10k, 1M, 10¹⁵; plain numbers for losses."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis, (low, high) = getattr(axes, f"{name}axis"), getattr(axes, f"get_{name}lim")()
        label, decades = axis.get_label_text(), np.log10(high / low)
        form = scientific if "FLOP" in label else "{:.3g}".format if "loss" in label else quantity
        if decades < 1.1:
            axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
            axis.set_minor_locator(NullLocator())
        else:
            subs = (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 2.6 else (1.0,)
            axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_major_formatter(FuncFormatter(partial(_tick, form)))
        axis.set_minor_formatter(NullFormatter())


def _tick(form: Any, value: float, _: Any) -> str:
    return form(value)


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scientific(value: float) -> str:
    """2.5·10¹⁵, as FLOPs are written."""
    mantissa, exponent = f"{value:.1e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    mantissa = mantissa.removesuffix(".0")
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _named(sizes: np.ndarray, most: int = 9) -> list[float]:
    """The sizes that get a line and a label of their own: all, or a spread of `most`."""
    sizes = np.unique(sizes)
    chosen = np.linspace(len(sizes) - 1, 0, min(most, len(sizes))).round().astype(int)
    return [float(sizes[i]) for i in sorted(set(chosen.tolist()))]


def _end_label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """A label just right of the point where its line ends."""
    label = axes.annotate(
        text, (x, y), (5, 0), textcoords="offset points", color=colour, fontsize=8.5, va="center"
    )
    label.set_label("end")


def _note(axes: Axes, text: str, colour: str) -> None:
    axes.text(
        0.97, 0.95, text, transform=axes.transAxes, ha="right", va="top", color=colour, fontsize=9.5
    )


def _spread_labels(figure: Figure, gap: float = 10.5) -> Figure:
    """Moves end labels apart vertically until none covers another (`gap` points between)."""
    axes = figure.axes[0]
    figure.canvas.draw()
    ends = [a for a in axes.texts if isinstance(a, Annotation) and a.get_label() == "end"]
    height = [float(axes.transData.transform(a.xy)[1]) * 72 / figure.dpi for a in ends]
    order = np.argsort(height, kind="stable")
    labels, y = [ends[i] for i in order], np.array(height)[order]
    spread = y.copy()
    for _ in range(200):  # push neighbours apart, a little from each side, until all fit
        close = np.maximum(gap - np.diff(spread), 0)
        if close.max(initial=0.0) < 0.05:
            break
        spread[:-1] -= close / 2
        spread[1:] += close / 2
    for label, shift in zip(labels, spread - y, strict=True):
        label.set_position((5, shift))
    return figure


def _binned(tokens: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve averaged over twentieths of a factor of ten, to quiet the noise of its batches."""
    bins = np.floor(20 * np.log10(tokens)).astype(int)
    groups = [bins == b for b in np.unique(bins)]
    return np.array([tokens[g].mean() for g in groups]), np.array([loss[g].mean() for g in groups])


def _trajectories(study: Study) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """(model size, tokens, loss) of each curve whose run the table knows, early noise included."""
    curves, runs = study.curves, study.runs
    assert curves is not None
    owner: dict[Any, float] = {}
    for column in ("model", "run_id"):
        if column in runs:
            owner |= dict(zip(runs[column], map(float, runs["params"]), strict=True))
    run = np.array(curves.column("run_id").to_pylist(), object)
    tokens = np.asarray(curves.column("tokens").to_numpy(), np.float64)
    loss = np.asarray(curves.column("loss").to_numpy(), np.float64)
    good = np.isfinite(loss) & (tokens >= runs["tokens"].min() / 30)
    out = []
    for name in dict.fromkeys(run):
        if name in owner:
            rows = np.flatnonzero((run == name) & good)
            rows = rows[np.argsort(tokens[rows], kind="stable")]
            out.append((owner[name], tokens[rows], loss[rows]))
    return out
