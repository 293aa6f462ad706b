"""The run that would tell most about a prediction, before it is trained."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from scaling.fit import Fit
from scaling.laws import evaluate
from scaling.plan.grid import SHORTEST
from scaling.plan.plan import Plan
from scaling.plan.shapes import Shape, ladder


@dataclass(frozen=True, kw_only=True)
class NextRun:
    """A run that could be added to a fit, and the prediction at the target with it.

    Attributes:
      shape, params, tokens, flops: the run.
      now, after: width of the 95 % interval of the loss at the target, without and with it.
    """

    shape: Shape
    params: int
    tokens: float
    flops: float
    now: float
    after: float

    @property
    def gain(self) -> float:
        """The part of the variance at the target that it is expected to take away."""
        return 1 - (self.after / self.now) ** 2

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the gain."""
        return vars(self) | {"shape": self.shape.name, "gain": self.gain}


def remaining_variance(
    target: Float[np.ndarray, "B"], seen: Float[np.ndarray, "B M"], noise: float
) -> Float[np.ndarray, "M"]:
    """The variance of f* once f(x) has been measured with noise, for each of M candidates x.

    var f* - cov(f*, f(x))^2 / (var f(x) + noise): exact where the draws are of a Gaussian. It does
    not depend on what is measured, so it is known before.

    Args:
      target: f* of each draw.
      seen: f(x) of each draw.
      noise: variance of one measurement.
    """
    t, s = target - target.mean(), seen - seen.mean(0)
    count = len(t) - 1
    spread = (s**2).sum(0) / count + noise
    told = np.divide((t @ s / count) ** 2, spread, out=np.zeros_like(spread), where=spread > 0)
    return t @ t / count - told


def next_runs(fitted: Fit, target: tuple[float, float], plan: Plan) -> list[NextRun]:
    """Runs on the ladder between the plan's ends, best first by what they add to a fit.

    f is the logarithm of the loss (the loss itself if that is what was fitted) over the bootstrap
    draws; the noise is the variance of the fit's residuals, from their median absolute deviation,
    inflated by n / (n - p).

    Args:
      fitted: with bootstrap draws.
      target: (params, tokens) of the run to be predicted.
      plan: its shapes at its budgets, each with each, are the candidates.

    Raises:
      ValueError: the fit has no draws, or is no law of params and tokens.
    """
    if not fitted.has_optimum:
        raise ValueError(f"{fitted.law.name} is not a law of params and tokens: fit another")
    if not fitted.draws:
        raise ValueError("a fit without bootstrap draws has no interval: fit with --bootstrap 1000")
    v, t = plan.vocab_size, plan.seq_len
    ends = [plan.sizes[i].shape.params(v, t) for i in (0, -1)]
    shapes = [shape for shape in ladder() if ends[0] <= shape.params(v, t) <= ends[1]]
    budgets = sorted({budget for size in plan.sizes for budget in size.budgets})
    candidates = [
        (shape, shape.params(v, t), c / shape.flops_per_token(v, t), c)
        for shape in shapes
        for c in budgets
        if c / shape.flops_per_token(v, t) >= SHORTEST * plan.batch_tokens
    ]
    x = {
        "params": np.array([target[0], *(n for _, n, _, _ in candidates)]),
        "tokens": np.array([target[1], *(d for _, _, d, _ in candidates)]),
    }
    drawn = {name: values[:, None] for name, values in fitted.draws.items()}
    f = evaluate(fitted.law, drawn, x)
    f = f if fitted.linear else np.log(f)
    f = f[np.isfinite(f).all(1)]
    r = fitted.residuals
    spare = fitted.n_runs - len(fitted.certificate["free"])
    deviation = 1.4826 * np.median(np.abs(r - np.median(r)))  # of a Gaussian: its sigma
    noise = float(deviation**2 * fitted.n_runs / max(spare, 1))
    after = remaining_variance(f[:, 0], f[:, 1:], noise)
    loss = 1.0 if fitted.linear else float(fitted.predict(params=target[0], tokens=target[1]).loss)

    def width(variance: float) -> float:
        return 2 * 1.96 * math.sqrt(max(variance, 0.0)) * loss

    now = width(float(f[:, 0].var(ddof=1)))
    rows = [
        NextRun(shape=shape, params=n, tokens=d, flops=c, now=now, after=width(float(left)))
        for (shape, n, d, c), left in zip(candidates, after, strict=True)
    ]
    return sorted(rows, key=lambda row: row.after)
