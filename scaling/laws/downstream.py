"""From the loss to the accuracy on a task (Bhagia et al. 2024)."""

from typing import Any

import jax
import numpy as np

from scaling.laws.law import Columns, Law, Parameter, grid


def downstream_sigmoid(x: Columns, a: Any, b: Any, k: Any, L_0: Any) -> Any:
    """Acc(L) = b + a / (1 + exp(k (L - L_0))): from chance, b, up to b + a as the loss falls."""
    return b + a * jax.nn.sigmoid(-k * (x["loss"] - L_0))


def _starts(x: Columns, accuracy: np.ndarray) -> dict[str, np.ndarray]:
    low, high = np.min(accuracy), np.max(accuracy)
    starts = grid(
        below=(0.0, 0.05, 0.2, 0.5),  # how far beyond the data the plateaus lie, in their range
        above=(0.0, 0.05, 0.2, 0.5, 1.0),
        where=(0.1, 0.3, 0.5, 0.7, 0.9),
        steepness=(2.0, 5.0, 12.0, 30.0),  # k times the range of the losses
    )
    reach = max(high - low, 1e-3)
    b = low - starts.pop("below") * reach
    return {
        "a": high + starts.pop("above") * reach - b,
        "b": b,
        "L_0": np.quantile(x["loss"], starts.pop("where")),
        "k": starts.pop("steepness") / max(np.ptp(x["loss"]), 1e-6),
    }


DOWNSTREAM_SIGMOID = Law(
    name="downstream_sigmoid",
    function=downstream_sigmoid,
    columns=("loss",),
    target="accuracy",
    linear=True,  # a few points of accuracy are a few points at chance as near the ceiling
    parameters=(
        Parameter(name="a", high=1.0),
        Parameter(name="b", high=1.0),
        Parameter(name="k", log=True),
        Parameter(name="L_0", log=True),
    ),
    starts=_starts,
    equation="Acc(L) = b + a / (1 + exp(k (L - L_0)))",
    source="Bhagia et al. 2024, section 3, arXiv 2412.04403",
)
