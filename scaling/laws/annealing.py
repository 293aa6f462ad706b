"""The loss at every step of a run from its learning-rate schedule (Tissue et al. 2024)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.laws.law import FLOOR, Columns, Law, Parameter, centre, power

MOMENTUM = 0.999  # of the annealing: lambda in Tissue et al. 2024, section 3


def lr_annealing(x: Columns, E: Any, A: Any, alpha: Any, C: Any) -> Any:
    """L(s) = E + A S_1^-alpha - C S_2: what the area under the schedule and its annealing give.

    S_1 is the sum of all learning rates to step s. S_2 is the annealing area: each fall of the rate
    keeps lowering the loss at every later step, fading by `MOMENTUM` a step.
    """
    return E + A * power(x["lr_sum"], -alpha) - C * x["lr_annealed"]


def lr_areas(x: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """S_1 and S_2 at the logged steps of each run, from its learning rates there.

    Between logged steps the rate is taken as linear; before the first, as equal to it. Only what
    falls after a run's highest rate is annealing: warm-up adds to S_1 and not to S_2.

    Args:
      x: run_id, step and learning_rate, (R,) each, in any order.

    Raises:
      ValueError: a step is negative.
    """
    from scipy.signal import lfilter

    steps, rates = x["step"].astype(int), x["learning_rate"]
    if (steps < 0).any():
        raise ValueError(f"lr_annealing: wanted steps from 0, got {steps.min()}")
    total, annealed = np.zeros(len(steps)), np.zeros(len(steps))
    for run in np.unique(x["run_id"].astype(str)):
        rows = np.flatnonzero(x["run_id"].astype(str) == run)
        rows = rows[np.argsort(steps[rows], kind="stable")]
        every = np.arange(1, max(steps[rows[-1]], 1) + 1)
        rate = np.interp(every, steps[rows], rates[rows])
        peak = int(np.argmax(rate))
        falls = -np.diff(rate, prepend=rate[0])
        falls[: peak + 1] = 0.0
        areas = np.cumsum(rate), np.cumsum(lfilter([1.0], [1.0, -MOMENTUM], falls))
        at = np.maximum(steps[rows], 1) - 1
        total[rows], annealed[rows] = areas[0][at], areas[1][at]
    return {"lr_sum": total, "lr_annealed": annealed}


def _starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
    """Given alpha the law is linear: E, A and C by least squares, kept where they may be."""
    starts = []
    for alpha in np.geomspace(0.05, 3.0, 32):
        terms = [
            np.ones(len(loss)),
            np.asarray(x["lr_sum"]) ** -alpha,
            -np.asarray(x["lr_annealed"]),
        ]
        E, A, C = np.linalg.lstsq(np.stack(terms, 1), loss, rcond=None)[0]
        above = np.median(loss) - max(E, 0.1 * np.min(loss))
        A = A if A > 0 else abs(above) * centre(x["lr_sum"]) ** alpha
        starts.append((max(E, 0.1 * np.min(loss)), A, alpha, max(C, 0.0)))
    return dict(zip(("E", "A", "alpha", "C"), np.array(starts).T, strict=True))


LR_ANNEALING = Law(
    name="lr_annealing",
    function=lr_annealing,
    columns=("lr_sum", "lr_annealed"),
    parameters=(
        FLOOR,
        Parameter(name="A", log=True),
        Parameter(name="alpha", high=5.0),
        Parameter(name="C"),
    ),
    starts=_starts,
    derive=lr_areas,
    needs=("run_id", "step", "learning_rate"),
    equation="L(s) = E + A S_1^-alpha - C S_2, S_1 the sum and S_2 the annealing of the rates",
    source="Tissue et al. 2024, equation 1, arXiv 2408.11029",
)
