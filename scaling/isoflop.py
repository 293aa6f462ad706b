"""Chinchilla's Approach 2: at each compute budget, the minimum of a curve of loss in log N.

Not the best run (argmin depends on which sizes were tried), but the minimum of a parabola, or of a
curve through all points (modified Akima) where a parabola is too stiff for the sizes; a budget
whose best run is its smallest or largest size has not bracketed its minimum and is dropped, by
name. Runs on an exact isoFLOP grid are used as they are; otherwise the losses of each size are
interpolated in log FLOPs (monotone cubic, within the measured range only) to common budgets.

    Hoffmann et al. 2022, section 3.2, arXiv 2203.15556
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from scaling.envelope import Frontier, frontier_lines, spans
from scaling.fit import Fit
from scaling.runs import Runs

SIZES = 4  # of a budget, at the least: three determine a parabola, the fourth can contradict it
SAME = 0.05  # budgets closer than this, relative, are one
METHODS = ("parabola", "akima")
BUDGETS = 7  # interpolated ones; Hoffmann et al. use nine over three decades


@dataclass(frozen=True, kw_only=True, eq=False)
class Budget:
    """One isoFLOP profile: FLOPs, its runs, and the parabola through them if it has a minimum.

    Attributes:
      flops: the budget.
      params, tokens, loss: its points, by rising size, (S,) each.
      coefficients: of the parabola of loss in log N, highest power first.
      params_best, tokens_best, loss_best: the minimum.
      problem: why it does not count, or "".
    """

    flops: float
    params: Float[np.ndarray, "S"]
    tokens: Float[np.ndarray, "S"]
    loss: Float[np.ndarray, "S"]
    coefficients: Float[np.ndarray, "3"]
    params_best: float
    tokens_best: float
    loss_best: float
    problem: str


def fit_isoflop(
    runs: Runs, *, method: str = "parabola", bootstrap: int = 0, seed: int = 0
) -> Frontier:
    """The exponents of the compute-optimal frontier by isoFLOP minima.

    Intervals are from a residual bootstrap: every run's loss is disturbed by a residual of the
    parabolas, drawn with replacement and inflated by sqrt(n / (n - 3)), and everything after,
    interpolation included, is done again.

    Args:
      runs: end points.
      method: the curve whose minimum counts: "parabola" by least squares, or "akima" through every
        point (Akima 1970, as modified in scipy).
      bootstrap: replicates for the intervals.
      seed: of the resampling.

    Raises:
      ValueError: an unknown method, or fewer than two budgets have a minimum inside their sizes.
    """
    if method not in METHODS:
        raise ValueError(f"method: wanted {' or '.join(METHODS)}, got {method!r}")
    profiles, exact = _profiles(runs, runs["loss"][:, None])
    budgets = [_budget(c, n, d, loss[:, 0], method) for c, n, d, loss in profiles]
    good = [i for i, budget in enumerate(budgets) if not budget.problem]
    dropped = tuple((f"budget {b.flops:.2e}: {b.problem}", 1) for b in budgets if b.problem)
    if len(good) < 2:
        found = "; ".join(reason for reason, _ in dropped) or f"no budget has {SIZES} sizes"
        raise ValueError(
            f"isoflop: {len(good)} budgets with {SIZES} sizes and a minimum inside, 2 are needed "
            f"({found}): train more sizes per budget, or a wider range of tokens per size"
        )
    kept = [budgets[i] for i in good]
    c, n, d = (
        np.array([getattr(b, name) for b in kept])
        for name in ("flops", "params_best", "tokens_best")
    )
    warnings = list(runs.warnings)
    if len(kept) < 3:
        warnings.append("isoflop: two budgets only: the exponents go through them exactly")
    if method == "akima" and not exact:
        warnings.append(
            "isoflop: the runs are no isoFLOP grid, and akima follows every error of interpolating "
            "them to one: prefer the parabola"
        )
    draws: dict[str, np.ndarray] = {}
    if bootstrap:
        residuals = np.concatenate(
            [
                (b.loss / np.polyval(b.coefficients, np.log(b.params)) - 1)
                * np.sqrt(len(b.loss) / (len(b.loss) - 3))
                for b in kept
            ]
        )
        noise = np.random.default_rng(seed).choice(residuals, (len(runs), bootstrap))
        again, _ = _profiles(runs, runs["loss"][:, None] * (1 + noise))
        minima = [_minimum(*again[i], method) for i in good]
        draws, lost = _draws(c, *(np.stack(v) for v in zip(*minima, strict=True)))
        if lost:
            warnings.append(f"isoflop: {lost} of {bootstrap} replicates kept fewer than 2 minima")
    return Frontier(
        method="isoflop",
        parameters={name: float(v) for name, v in frontier_lines(c, n, d).items()},
        flops=c,
        params=n,
        tokens=d,
        loss=np.array([b.loss_best for b in kept]),
        draws=draws,
        intervals=spans(draws),
        flops_convention=runs.flops_convention,
        n_runs=len(runs),
        dropped=runs.dropped + dropped,
        warnings=tuple(warnings),
        budgets=tuple(budgets),
    )


def bias(runs: Runs, fitted: Fit, *, method: str = "parabola") -> dict[str, float]:
    """How far Approach 2 would be off on these very sizes and budgets if Approach 3 were right.

    The loss of every run is replaced by the fitted law's, without noise; what `fit_isoflop` then
    says is compared with the law's own optimum. Parabolas of a curve that is none, on a grid that
    is not centred, are off by some percent.

    Args:
      runs: as for `fit_isoflop`.
      fitted: a law of params and tokens, on the same runs.
      method: as for `fit_isoflop`.

    Returns:
      a: the error of the exponent; params: of N* at ten times the largest budget, relative.

    Raises:
      ValueError: as `fit_isoflop` does.
    """
    law = fitted.predict(params=runs["params"], tokens=runs["tokens"]).loss
    found = fit_isoflop(runs.with_columns(loss=law), method=method).parameters
    budgets = np.array([runs["flops"].min(), 10 * runs["flops"].max()])
    best = fitted.optimal(budgets).params
    a = np.diff(np.log(best))[0] / np.diff(np.log(budgets))[0]
    params = found["params_coefficient"] * budgets[1] ** found["a"] / best[1] - 1
    return {"a": float(found["a"] - a), "params": float(params)}


Profile = tuple[float, np.ndarray, np.ndarray, np.ndarray]  # C, N (S,), D (S,), losses (S, B)


def _profiles(runs: Runs, losses: np.ndarray) -> tuple[list[Profile], bool]:
    """The isoFLOP profiles for each column of `losses`, (R, B), and whether the runs are a grid."""
    exact = _exact(runs, losses)
    inside = sum(len(profile[1]) for profile in exact)
    if len(exact) >= 2 and inside >= len(runs) / 2:
        return exact, True
    return _interpolated(runs, losses), False


def _exact(runs: Runs, losses: np.ndarray) -> list[Profile]:
    c, n, d = runs["flops"], runs["params"], runs["tokens"]
    order = np.argsort(c, kind="stable")
    breaks = np.flatnonzero(np.diff(np.log(c[order])) > np.log1p(SAME)) + 1
    profiles = []
    for rows in np.split(order, breaks):
        if np.ptp(np.log(c[rows])) > 2 * np.log1p(SAME):
            continue  # a chain of close values is no budget
        # Of runs of one size the first by tokens stands for it; an exact grid has only one.
        _, first = np.unique(n[rows], return_index=True)
        rows = rows[first]
        if len(rows) >= SIZES:
            mean = float(np.exp(np.mean(np.log(c[rows]))))
            profiles.append((mean, n[rows], d[rows], losses[rows]))
    return profiles


def _interpolated(runs: Runs, losses: np.ndarray) -> list[Profile]:
    from scipy.interpolate import PchipInterpolator

    c, n, d = np.log(runs["flops"]), runs["params"], runs["tokens"]
    sizes = []
    for size in np.unique(n):
        rows = np.flatnonzero(n == size)
        rows = rows[np.unique(c[rows], return_index=True)[1]]
        if len(rows) >= 2:
            log_loss = PchipInterpolator(c[rows], np.log(losses[rows]), extrapolate=False)
            rate = PchipInterpolator(c[rows], c[rows] - np.log(d[rows]), extrapolate=False)
            sizes.append((size, c[rows[0]], c[rows[-1]], log_loss, rate))
    ladder = np.linspace(c.min(), c.max(), 512)
    covered = ladder[sum((lo <= ladder) & (ladder <= hi) for _, lo, hi, *_ in sizes) >= SIZES]
    profiles: list[Profile] = []
    for at in np.linspace(covered[0], covered[-1], BUDGETS) if covered.size else ():
        chosen = [s for s in sizes if s[1] <= at <= s[2]]
        if len(chosen) >= SIZES:
            tokens = np.array([np.exp(at - rate(at)) for *_, rate in chosen])
            values = np.stack([np.exp(f(at)) for *_, f, _ in chosen])
            profiles.append((float(np.exp(at)), np.array([s[0] for s in chosen]), tokens, values))
    return profiles


def _parabola(n: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Coefficients (3, B) of loss in log N, highest power first."""
    middle = np.log(n).mean()
    centred = np.linalg.pinv(np.vander(np.log(n) - middle, 3)) @ losses
    a, b, c = centred  # back from log N - middle to log N
    return np.stack([a, b - 2 * a * middle, c - b * middle + a * middle**2])


def _minimum(
    flops: float, n: np.ndarray, d: np.ndarray, losses: np.ndarray, method: str
) -> tuple[np.ndarray, np.ndarray]:
    """N and D at the minimum of each column's curve, (B,) each; NaN where none is inside."""
    log_n = (_vertex if method == "parabola" else _lowest)(n, losses)
    log_n = np.where((log_n > np.log(n[0])) & (log_n < np.log(n[-1])), log_n, np.nan)
    # D at the minimum: FLOPs per token, as a power of N, from the budget's own runs.
    slope, level = np.polyfit(np.log(n), np.log(flops / d), 1)
    return np.exp(log_n), np.exp(np.log(flops) - slope * log_n - level)


def _vertex(n: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """log N at the vertex of each column's parabola, (B,); NaN if that is no minimum."""
    a, b, _ = _parabola(n, losses)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, -b / (2 * a), np.nan)


def _lowest(n: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """log N at the lowest point of the modified Akima curve of each column, (B,)."""
    from scipy.interpolate import Akima1DInterpolator

    at = np.linspace(np.log(n[0]), np.log(n[-1]), 2001)
    values = Akima1DInterpolator(np.log(n), losses, method="makima")(at)
    lowest = np.clip(np.argmin(values, axis=0), 1, len(at) - 2)
    left, middle, right = np.stack(
        [np.take_along_axis(values, (lowest + i)[None], 0)[0] for i in (-1, 0, 1)]
    )
    # The vertex through the three points there; past them the minimum lies at the edge.
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = (left - right) / (2 * (left - 2 * middle + right))
    return np.where(np.abs(shift) <= 1, at[lowest] + shift * (at[1] - at[0]), np.nan)


def _budget(flops: float, n: np.ndarray, d: np.ndarray, loss: np.ndarray, method: str) -> Budget:
    coefficients = _parabola(n, loss[:, None])[:, 0]
    (best_n,), (best_d,) = _minimum(flops, n, d, loss[:, None], method)
    lowest = int(np.argmin(loss))
    problem = ""
    if lowest in (0, len(n) - 1):
        problem = f"its least loss is at its {'smallest' if lowest == 0 else 'largest'} size"
    elif not np.isfinite(best_n):
        problem = f"its {method} has no minimum among its sizes"
    return Budget(
        flops=flops,
        params=n,
        tokens=d,
        loss=loss,
        coefficients=coefficients,
        params_best=float(best_n),
        tokens_best=float(best_d),
        loss_best=float(np.polyval(coefficients, np.log(best_n))),
        problem=problem,
    )


def _draws(c: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Replicates of the lines, and how many had fewer than two minima."""
    enough = np.isfinite(n).sum(0) >= 2
    return frontier_lines(c, n[:, enough], d[:, enough]), int((~enough).sum())
