"""How else a fit could have come out: bootstraps of three kinds, and profile likelihood."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from scaling.certificate import ROUNDING
from scaling.solver import Problem, huber, minimise

BLOCK = 256  # replicates per solver call: keeps its working set small
RESAMPLING = ("cases", "residuals")
CHI2 = 3.841458820694124  # the 95 % point of chi-squared with one degree of freedom


def resample(n: int, times: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Bootstrap weights, (times, n): how often each run, or each run's whole group, was drawn."""
    rng = np.random.default_rng(seed)
    if groups is None:
        index, count = np.arange(n), n
    else:
        _, index = np.unique(groups.astype(str), return_inverse=True)
        count = int(index.max()) + 1
    drawn = rng.integers(count, size=(times, count))
    return np.stack([np.bincount(row, minlength=count) for row in drawn])[:, index].astype(float)


def bootstrap_draws(
    problem: Problem,
    u: Float[np.ndarray, "P"],
    delta: float,
    *,
    times: int,
    seed: int,
    resampling: str,
    groups: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], int]:
    """Refits from the optimum: {parameter: (times,)}, and how many were still moving at the end.

    Args:
      problem: what was fitted.
      u: its optimum, in the solver's coordinates.
      delta: of the objective; finer than 1e-5 (absolute deviations) is rounded up to that.
      times: replicates.
      seed: of the resampling.
      resampling: "cases" draws runs, or whole groups of them, with replacement; "residuals" keeps
        every run and adds a residual of the fit, drawn with replacement and inflated by
        sqrt(n / (n - p)), to its predicted loss: for designed grids, where to lose all runs of a
        size is no event that could have happened.
      groups: of the runs, (R,), drawn whole.
    """
    delta = max(delta, 1e-5)
    runs = len(problem.target)
    shifts: Any = None
    if resampling == "cases":
        weights = resample(runs, times, seed, groups)
    else:
        weights = np.ones((times, runs))
        found = problem.evaluate(u[None])[0][0]
        inflated = found * np.sqrt(runs / max(runs - problem.free.sum(), 1))
        shifts = np.random.default_rng(seed).choice(inflated, (times, runs)) - found

    def block(begin: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(begin, begin + BLOCK)
        end, _, settled = minimise(
            problem,
            np.repeat(u[None], len(weights[rows]), axis=0),
            weights=weights[rows],
            shifts=None if shifts is None else shifts[rows],
            delta=delta,
            iterations=60,
            tolerance=1e-9,
        )
        return end, settled

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        ends, settled = zip(*pool.map(block, range(0, times, BLOCK)), strict=True)
    return problem.natural(np.concatenate(ends)), int((~np.concatenate(settled)).sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """One parameter held at each of some values, and all others fitted again.

    Attributes:
      name: of the parameter.
      values: at which it was held, natural units, (K,).
      statistic: of the likelihood ratio there, (K,): about chi-squared with one degree of freedom.
      interval: 95 %: where the statistic is below 3.84; an end that was not reached is infinite (or
        zero, for a logarithmic parameter), and the runs do not bound the parameter on that side.
    """

    name: str
    values: Float[np.ndarray, "K"]
    statistic: Float[np.ndarray, "K"]
    interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """As plain values; an open end is None."""
        return {
            "interval": [v if np.isfinite(v) and v != 0 else None for v in self.interval],
            "values": self.values.tolist(),
            "statistic": self.statistic.tolist(),
        }


def profile_likelihood(
    problem: Problem, u: Float[np.ndarray, "P"], delta: float, name: str, *, points: int = 24
) -> Profile:
    """The profile likelihood of one free parameter.

    The statistic is that of robust likelihood-ratio tests, 2 (rho_1 - rho_0) sum psi' / sum psi^2
    (Schrader and Hettmansperger 1980), with psi the derivative of Huber's rho; with squares it is
    the usual one. It is followed outward from the optimum on each side, each point starting from
    the one before, in steps that double until the statistic has passed 3.84.
    """
    index = problem.law.names.index(name)
    low, high = (bound[index] for bound in problem.bounds)
    residuals, jacobian = (a[0] for a in problem.evaluate(u[None]))
    ones = np.ones((1, len(residuals)))
    held = replace(problem, free=problem.free & (np.arange(len(u)) != index))
    scale = _likelihood_scale(residuals, delta, int(problem.free.sum()))
    least = float(np.sum(huber(residuals, delta)))

    def at(value: float, start: np.ndarray) -> tuple[np.ndarray, float]:
        moved = start.copy()
        moved[index] = value
        end, total, _ = minimise(held, moved[None], weights=ones, delta=delta, iterations=200)
        return end[0], float(2 * (total[0] - least) * scale)

    # The first step: a tenth of the standard error with all others held, so never too long.
    first = 0.1 / np.sqrt(scale * np.sum(jacobian[:, index] ** 2) + 1e-300)
    seen = [(u[index], 0.0)]
    ends = []
    for sign, bound in ((-1, low), (1, high)):
        edge, where, step, before = np.inf * sign, u, first, (u[index], 0.0)
        for _ in range(points):
            value = np.clip(before[0] + sign * step, low, high)
            where, statistic = at(value, where)
            seen.append((value, statistic))
            if statistic >= CHI2:
                # The root of the statistic is about linear in the parameter.
                roots = np.sqrt(np.maximum([before[1], statistic], 0.0))
                part = (np.sqrt(CHI2) - roots[0]) / max(roots[1] - roots[0], 1e-12)
                edge = before[0] + part * (value - before[0])
                break
            if value == bound:
                break
            before, step = (value, statistic), 1.6 * step
        ends.append(float(edge))
    values, statistic = np.array(sorted(seen)).T
    natural = np.exp if problem.law.parameters[index].log else np.asarray
    return Profile(
        name=name,
        values=natural(values),
        statistic=statistic,
        interval=(float(natural(ends[0])), float(natural(ends[1]))),
    )


def _likelihood_scale(residuals: np.ndarray, delta: float, parameters: int) -> float:
    """sum psi' / sum psi^2: what turns a difference of objectives into one of log likelihoods.

    psi' is 1 within delta and 0 beyond. With a delta far below the residuals few are within, so
    their density at zero is taken from a wider window.
    """
    n = len(residuals)
    spread = 1.4826 * np.median(np.abs(residuals))
    window = max(spread / 2, ROUNDING)
    if delta < window:
        within = np.mean(np.abs(residuals) <= window) * delta / window
    else:
        within = np.mean(np.abs(residuals) <= delta)
    psi = np.clip(residuals, -delta, delta)
    square = max(np.sum(psi**2) / max(n - parameters, 1), ROUNDING**2)
    return float(within / square)
