"""What was measured: the losses of all runs while they trained, before any law."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scaling.plots.style import (
    CROWD,
    PAPER,
    dots,
    empty,
    end_label,
    log,
    named,
    size_colours,
    spread_labels,
)
from scaling.study import Study, quantity


def loss_curves(study: Study) -> Figure:
    """Loss while training, one colour per size, with the end points that are fitted."""
    figure, axes = empty("training tokens", "loss, nats per token")
    colours, runs = size_colours(study), study.runs
    if study.curves is not None:
        for size, tokens, loss in _trajectories(study):
            axes.plot(*_binned(tokens, loss), color=colours[size], lw=1.0, alpha=0.8)
    labelled = named(runs["params"])
    for size, colour in colours.items():
        mine = runs["params"] == size
        tokens, loss = runs["tokens"][mine], runs["loss"][mine]
        if study.curves is None and len(colours) <= CROWD:
            axes.plot(tokens, loss, color=colour, lw=1.0, alpha=0.8)
        if size in labelled:
            last = np.argmax(tokens)
            end_label(axes, tokens[last], loss[last], quantity(size), colour)
    rim = {"edgecolors": PAPER, "linewidths": 0.6}
    dots(axes, runs["tokens"], runs["loss"], runs["params"], colours, 5.5, **rim)
    log(axes, "xy")
    return spread_labels(figure)


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
