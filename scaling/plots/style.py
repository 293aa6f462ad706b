"""How all figures look: colours, axes, marks, labels, and SVG without anything that varies.

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

from scaling.study import Study, quantity

INK, MUTED, FAINT, ACCENT, PAPER = "#1c2128", "#59636e", "#d5dae0", "#c2361c", "#fefefe"
DARK = {INK: "#e8ebef", MUTED: "#9aa4b0", FAINT: "#363d47", ACCENT: "#ff8062", PAPER: "#161a20"}
SIZE = (4.4, 3.4)  # inches
CROWD = 25  # more sizes than this, and lines that join the runs of each would be a thicket
MATHS = "#3a6ea5"  # second voice: fitted lines that belong to no size
DARK |= {MATHS: "#7fb2e8"}
SVG: Any = {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.family": "sans-serif"}


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


def write_svg(figure: Figure, path: Any) -> None:
    """A figure as a file of its own, on white; the same bytes for the same figure."""
    with matplotlib.rc_context(SVG):
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def to_svg(figure: Figure, *, prefix: str = "", colours: dict[str, str] | None = None) -> str:
    """A figure as an <svg> element: deterministic, scalable, without XML header.

    Args:
      figure: from this package.
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
    svg = re.sub(r"(\d\.\d\d)\d{3,4}\b", r"\1", svg)  # a hundredth of a point is enough
    for light, replacement in (colours or {}).items():
        svg = svg.replace(light, replacement)
    return svg


def empty(x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure with quiet axes; labels may hang over its right edge by a fifth."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_axes((0.16, 0.145, 0.66, 0.825))
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


def log(axes: Axes, which: str) -> None:
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


def dots(
    axes: Axes, x: Any, y: Any, sizes: Any, colours: dict[float, str], ms: float, **look: Any
) -> None:
    """Runs, each in the colour of its size; `ms` points across, less in a crowd."""
    each = [colours.get(float(size), MUTED) for size in sizes]
    # Unclipped: the axes hold all runs, and clipping each dot would double the file.
    plain: dict[str, Any] = {"c": each, "edgecolors": "none", "zorder": 2.5, "clip_on": False}
    look = plain | look
    if look["c"] == "none":  # rings
        look["edgecolors"] = each
    elif len(each) >= 100:
        ms, look["edgecolors"] = 0.75 * ms, "none"
    axes.scatter(x, y, s=ms**2, **look)


def diamonds(axes: Axes, x: Any, y: Any) -> None:
    """Runs that were held out."""
    axes.plot(x, y, "D", mfc=PAPER, mec=ACCENT, ms=5.5, mew=1.5, zorder=3)


def band(axes: Axes, x: Any, span: Any, colour: str, alpha: float = 0.16) -> None:
    """Between the two lines of `span`, (low, high)."""
    axes.fill_between(x, span[0], span[1], color=colour, alpha=alpha, lw=0)


def named(sizes: np.ndarray, most: int = 9) -> list[float]:
    """The sizes that get a line and a label of their own: all, or a spread of `most`."""
    sizes = np.unique(sizes)
    chosen = np.linspace(len(sizes) - 1, 0, min(most, len(sizes))).round().astype(int)
    return [float(sizes[i]) for i in sorted(set(chosen.tolist()))]


def end_label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """A label just right of the point where its line ends."""
    label = axes.annotate(
        text,
        (x, y),
        (5, 0),
        textcoords="offset points",
        color=colour,
        fontsize=8.5,
        va="center",
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4, "alpha": 0.7},
    )
    label.set_label("end")


def note(axes: Axes, text: str, colour: str, x: float = 0.97, y: float = 0.95) -> None:
    """A remark in a corner; `x` and `y` are parts of the axes, and it grows away from their end."""
    sides: Any = {"ha": "right" if x > 0.5 else "left", "va": "top" if y > 0.5 else "bottom"}
    axes.text(x, y, text, transform=axes.transAxes, color=colour, fontsize=9, **sides)


def spread_labels(figure: Figure, gap: float = 10.5) -> Figure:
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
