"""Chinchilla's Approach 1: the compute-optimal frontier as the lower envelope of all points.

Of all (FLOPs, loss) points, of whatever size, those on the lower envelope were the best use of
their compute; their N and D against C give the exponents of N* = G C^a and D* = H C^b.

    Hoffmann et al. 2022, section 3.1 (arXiv 2203.15556); the convex hull in log-log as the
    envelope is McLeish et al. 2025, Gemstones (arXiv 2502.06857).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scaling.runs import Runs
from scaling.uncertainty import resample


@dataclass(frozen=True, kw_only=True, eq=False)
class Frontier:
    """N* = params_coefficient C^a and D* = tokens_coefficient C^b, and what they rest on.

    Attributes:
      method: "envelope" or "isoflop".
      parameters: a, params_coefficient, b, tokens_coefficient.
      flops, params, tokens, loss: the optimal points through which the lines go, (K,) each.
      draws: bootstrap replicates of the parameters, {name: (B,)}.
      intervals: their 95 % percentile intervals.
      flops_convention: how C was counted; a and b move with it.
      n_runs: runs looked at.
      dropped: (reason, number) of runs or budgets that were not used.
      warnings: in plain words.
      budgets: what was fitted at each budget, for figures (Approach 2).
    """

    method: str
    parameters: dict[str, float]
    flops: Float[np.ndarray, "K"]
    params: Float[np.ndarray, "K"]
    tokens: Float[np.ndarray, "K"]
    loss: Float[np.ndarray, "K"]
    draws: dict[str, np.ndarray]
    intervals: dict[str, tuple[float, float]]
    flops_convention: str
    n_runs: int
    dropped: tuple[tuple[str, int], ...] = ()
    warnings: tuple[str, ...] = ()
    budgets: tuple[Any, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The frontier as plain Python values, under the keys of a fit where they mean the same."""
        points = zip(self.flops, self.params, self.tokens, self.loss, strict=True)
        return {
            "law": self.method,
            "parameters": self.parameters,
            **dict.fromkeys(("objective", "loss", "delta", "certificate", "holdout")),
            "n_runs": self.n_runs,
            "dropped": [{"reason": reason, "n": n} for reason, n in self.dropped],
            "intervals": {name: list(span) for name, span in self.intervals.items()},
            "bootstrap": len(next(iter(self.draws.values()), ())),
            "optimal": [
                dict(zip(("flops", "params", "tokens", "loss"), map(float, point), strict=True))
                for point in points
            ],
            "flops_convention": self.flops_convention,
            "warnings": list(self.warnings),
        }


def fit_envelope(
    runs: Runs, *, bootstrap: int = 0, seed: int = 0, group: str | None = None
) -> Frontier:
    """The exponents of the compute-optimal frontier by the lower convex hull in log-log.

    Args:
      runs: end points, or all points of curves (one row each).
      bootstrap: replicates for the intervals.
      seed: of the resampling.
      group: a column whose values are resampled whole, such as the run of a curve's points.

    Raises:
      ValueError: fewer than three points are on the frontier.
    """
    c, n, d, loss = (runs[name] for name in ("flops", "params", "tokens", "loss"))
    on = lower_hull(c, loss)
    if len(on) < 3:
        raise ValueError(
            f"envelope: only {len(on)} of {len(runs)} runs are on the compute-optimal frontier and "
            "3 are needed: add sizes or budgets"
        )
    draws: dict[str, list[float]] = {
        name: [] for name in ("a", "params_coefficient", "b", "tokens_coefficient")
    }
    failed = 0
    weights = (
        resample(len(runs), bootstrap, seed, runs[group] if group else None) if bootstrap else ()
    )
    for row in weights:
        chosen = np.flatnonzero(row)
        hull = chosen[lower_hull(c[chosen], loss[chosen])]
        if len(hull) < 3 or np.ptp(c[hull]) == 0:
            failed += 1
            continue
        for name, value in frontier_lines(c[hull], n[hull], d[hull]).items():
            draws[name].append(float(value))
    kept = {name: np.array(values) for name, values in draws.items() if values}
    warnings = list(runs.warnings)
    if failed:
        warnings.append(
            f"envelope: {failed} of {bootstrap} bootstrap frontiers had fewer than 3 points"
        )
    return Frontier(
        method="envelope",
        parameters={name: float(v) for name, v in frontier_lines(c[on], n[on], d[on]).items()},
        flops=c[on],
        params=n[on],
        tokens=d[on],
        loss=loss[on],
        draws=kept,
        intervals=spans(kept),
        flops_convention=runs.flops_convention,
        n_runs=len(runs),
        dropped=runs.dropped,
        warnings=tuple(warnings),
    )


def lower_hull(flops: Float[np.ndarray, "R"], loss: Float[np.ndarray, "R"]) -> Int[np.ndarray, "K"]:
    """Indices of the points on the lower-left convex hull of (log C, log L), by rising C.

    A vantage point at (2 max C, 2 max L) closes the hull above; of its vertices those stay whose
    loss is below that of every cheaper one.
    """
    x = np.append(np.log(flops), np.log(2 * flops.max()))
    y = np.append(np.log(loss), np.log(2 * loss.max()))
    order = np.lexsort([y, x])
    hull: list[int] = []
    for i in order:  # Andrew's monotone chain: keep only left turns
        while len(hull) >= 2:
            (p, q) = hull[-2:]
            if (x[q] - x[p]) * (y[i] - y[p]) > (y[q] - y[p]) * (x[i] - x[p]):
                break
            hull.pop()
        hull.append(int(i))
    kept: list[int] = []
    for i in hull:
        if i < len(flops) and (not kept or loss[i] < loss[kept[-1]]):
            kept.append(i)
    return np.array(kept, np.int64)


def spans(draws: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of some draws."""
    return {
        name: (float(np.quantile(v, 0.025)), float(np.quantile(v, 0.975)))
        for name, v in draws.items()
    }


def frontier_lines(c: np.ndarray, n: np.ndarray, d: np.ndarray) -> dict[str, Any]:
    """Least-squares lines of log N and log D, each (K, ...), in log C, (K,), without NaN points."""
    names = (("a", "params_coefficient", n), ("b", "tokens_coefficient", d))
    out: dict[str, Any] = {}
    for exponent, coefficient, values in names:
        y = np.log(values)
        x = np.where(np.isfinite(y.T), np.log(c), np.nan).T
        mean_x, mean_y = np.nanmean(x, 0), np.nanmean(y, 0)
        slope = np.nansum((x - mean_x) * (y - mean_y), 0) / np.nansum((x - mean_x) ** 2, 0)
        out |= {exponent: slope, coefficient: np.exp(mean_y - slope * mean_x)}
    return out
