"""Many small robust regressions at once: batched damped Newton on sums of Huber terms.

Each lane of the batch minimises  sum_i w_i huber_delta(r_i(u))  over the same runs, from a start or
under bootstrap weights of its own. The objective is scaled so badly for a line search (1e-3 in all,
nearly absolute deviations) that general minimisers stop at their start and report success; so:

- residuals and their Jacobian come from the law by forward-mode autodiff, in float64, in one
  compiled program of fixed shape (lanes in chunks, runs padded with weight zero);
- far from the optimum the curvature is that of reweighted least squares, which bounds Huber's
  objective from above, so steps are large and safe; near it, the exact Hessian, which converges
  quadratically where reweighting crawls;
- each step is |Hessian| + damping in its own eigenbasis: always downhill, saddles included. An
  eigendecomposition of 4000 5x5 matrices takes 40 ms in numpy; a batched solve inside XLA is what
  made a naive vmapped version take minutes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from scaling.laws import Law

LANES = 32  # per compiled call: keeps a chunk of 256 runs and 5 parameters within the L2 cache
RUNS = 64  # runs are padded to a multiple of this, so that refits on subsets share the program
POLISHED = 32  # starts that are followed to their end: half the best, half spread over the rest
STEP = 1e-6  # of the finite difference of the Jacobian: about the square root of float64's epsilon


@partial(jax.jit, static_argnames=("law", "linear"))
def _evaluate(u: Any, x: Any, target: Any, *, law: Law, linear: bool) -> Any:
    """Residuals and Jacobian of each lane: (L, P) -> (L, R), (L, R, P)."""

    def residual(u: Any) -> Any:
        values = {
            p.name: jnp.exp(v) if p.log else v for p, v in zip(law.parameters, u, strict=True)
        }
        predicted = law.function(x, **values)
        return predicted - target if linear else jnp.log(predicted) - jnp.log(target)

    def both(u: Any) -> Any:
        r = residual(u)
        return r, r

    jacobian, r = jax.vmap(jax.jacfwd(both, has_aux=True))(u)
    return r, jacobian


def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond: Huber 1964; delta = inf is squares."""
    a = np.abs(r)
    if np.isinf(delta):
        return 0.5 * a * a
    return np.where(a < delta, 0.5 * a * a, delta * (a - 0.5 * delta))


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The regression of one law on one set of runs.

    Attributes:
      law: what is fitted.
      x: the law's columns, each (R,), float64.
      target: what was measured, nats per token unless the law says otherwise, (R,).
      linear: residuals of the target itself instead of its logarithm.
      free: which parameters move, (P,).
    """

    law: Law
    x: Mapping[str, np.ndarray]
    target: Float[np.ndarray, "R"]
    linear: bool
    free: Bool[np.ndarray, "P"]

    def internal(self, natural: Mapping[str, Any]) -> np.ndarray:
        """Natural parameters, {name: (L,)}, to the solver's coordinates, (L, P)."""
        with np.errstate(divide="ignore"):
            columns = [
                np.log(natural[p.name]) if p.log else np.asarray(natural[p.name], np.float64)
                for p in self.law.parameters
            ]
        return np.stack(np.broadcast_arrays(*columns), -1).astype(np.float64)

    def natural(self, u: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `internal`."""
        return {
            p.name: np.asarray(np.exp(u[..., i]) if p.log else u[..., i])
            for i, p in enumerate(self.law.parameters)
        }

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds in the solver's coordinates, (P,) each."""
        low = self.internal({p.name: p.low for p in self.law.parameters})
        return low, self.internal({p.name: p.high for p in self.law.parameters})

    @cached_property
    def padded(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Columns and target, lengthened to a multiple of RUNS by repeating the last run."""
        pad = (0, -len(self.target) % RUNS)
        x = {k: np.pad(np.asarray(v, np.float64), pad, "edge") for k, v in self.x.items()}
        return x, np.pad(self.target, pad, "edge")

    def evaluate(self, u: Float[np.ndarray, "L P"]) -> tuple[np.ndarray, np.ndarray]:
        """Residuals (L, R) and their Jacobian (L, R, P); the columns of fixed parameters are 0."""
        lanes, runs = len(u), len(self.target)
        x, target = self.padded
        u = np.concatenate([u, np.repeat(u[-1:], -lanes % LANES, axis=0)])
        residuals, jacobian = np.empty((len(u), runs)), np.empty((len(u), runs, u.shape[1]))
        # Always on the CPU: accelerators have slow float64 or none.
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            for i in range(0, len(u), LANES):
                r, j = _evaluate(u[i : i + LANES], x, target, law=self.law, linear=self.linear)
                residuals[i : i + LANES] = np.asarray(r)[:, :runs]
                jacobian[i : i + LANES] = np.asarray(j)[:, :runs]
        if not self.free.all():
            jacobian *= self.free
        return residuals[:lanes], jacobian[:lanes]

    def objective(self, u: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
        """sum_i w_i huber(r_i) of each lane, (L,); infinite where the law is not finite."""
        return _total(self.evaluate(u)[0], weights, delta)


def _total(residuals: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        total = np.sum(weights * huber(residuals, delta), -1)
    return np.where(np.isfinite(total), total, np.inf)


def derivatives(
    problem: Problem,
    u: np.ndarray,
    residuals: np.ndarray,
    jacobian: np.ndarray,
    weights: np.ndarray,
    delta: float,
    exact: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (L, P) and curvature (L, P, P): the Hessian where `exact`, else the majoriser's."""
    a = np.abs(residuals)
    slope = weights * np.clip(residuals, -delta, delta)
    bend = weights * np.where(
        exact[:, None], a < delta, 1.0 if np.isinf(delta) else delta / np.maximum(a, delta)
    )
    gradient = (slope[:, None] @ jacobian)[:, 0]
    hessian = np.swapaxes(jacobian * bend[..., None], 1, 2) @ jacobian
    if (chosen := np.flatnonzero(exact)).size:
        second = np.zeros((len(chosen), u.shape[1], u.shape[1]))
        for p in np.flatnonzero(problem.free):
            moved = u[chosen].copy()
            moved[:, p] += STEP
            change = (problem.evaluate(moved)[1] - jacobian[chosen]) / STEP
            second[:, p] = (slope[chosen, None] @ change)[:, 0]
        hessian[chosen] += (second + np.swapaxes(second, 1, 2)) / 2
    return gradient, hessian


def _downhill(
    gradient: np.ndarray, hessian: np.ndarray, scale: np.ndarray, damping: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The damped Newton step in the eigenbasis of the scaled Hessian, and its predicted gain."""
    g = gradient / scale
    values, vectors = np.linalg.eigh(hessian / (scale[:, :, None] * scale[:, None, :]))
    along = np.einsum("lpq,lp->lq", vectors, g)
    values = np.abs(values) + damping[:, None] + 1e-14
    step = -np.einsum("lpq,lq->lp", vectors, along / values)
    return step / scale, 0.5 * np.sum(along**2 / values, -1)


def minimise(
    problem: Problem,
    u: Float[np.ndarray, "L P"],
    *,
    weights: Float[np.ndarray, "L R"],
    shifts: Float[np.ndarray, "L R"] | None = None,
    delta: float,
    iterations: int = 200,
    tolerance: float = 1e-13,
) -> tuple[Float[np.ndarray, "L P"], Float[np.ndarray, "L"], Bool[np.ndarray, "L"]]:
    """Minimises each lane from its own start, within the bounds of the law's parameters.

    Args:
      problem: law and runs.
      u: starts in the solver's coordinates; non-finite starts stay where they are.
      weights: how often each run counts in each lane.
      shifts: added to each lane's residuals.
      delta: where Huber turns from squares to absolute values, in units of the residuals.
      iterations: at most this many steps.
      tolerance: a lane has settled when its next step would lower its objective by less than this
        part of it; Newton's error is then the square of the last step's.

    Returns:
      The end points, their objectives, and which lanes settled within the iterations.
    """
    low, high = problem.bounds
    best = np.where(problem.free, np.clip(u, low, high), u)
    objective = np.full(len(u), np.inf)
    shifts = np.zeros((len(u), 1)) if shifts is None else shifts
    residuals, jacobian = problem.evaluate(best)
    residuals = residuals + shifts
    objective[:] = _total(residuals, weights, delta)
    damping, exact = np.full(len(u), 1e-2), np.zeros(len(u), bool)
    active = np.flatnonzero(np.isfinite(objective))
    residuals, jacobian = residuals[active], jacobian[active]
    for _ in range(iterations):
        if not active.size:
            break
        at, w = best[active], weights[active]
        gradient, hessian = derivatives(problem, at, residuals, jacobian, w, delta, exact[active])
        # A parameter that sits on its bound and is pushed outward does not move.
        held = ((at <= low) & (gradient > 0)) | ((at >= high) & (gradient < 0)) | ~problem.free
        gradient = np.where(held, 0.0, gradient)
        hessian = np.where(held[:, :, None] | held[:, None, :], 0.0, hessian)
        # Scaled by the Jacobian's own columns, the problem has no units.
        scale = np.sqrt((w[:, None] @ jacobian**2)[:, 0]) + 1e-150
        size = np.maximum(np.trace(hessian / scale[:, :, None] ** 2, axis1=1, axis2=2), 1e-300)
        step, gain = _downhill(gradient, hessian, scale, damping[active] * size)
        moved = np.clip(at + np.where(held, 0.0, np.clip(step, -3, 3)), low, high)
        r, j = problem.evaluate(moved)
        r = r + shifts[active]
        new = _total(r, w, delta)
        better = new < objective[active]
        with np.errstate(invalid="ignore"):
            progress = np.where(better, 1 - new / objective[active], 0.0)
        damping[active] *= np.where(better, 0.2, 8.0)
        best[active] = np.where(better[:, None], moved, at)
        objective[active] = np.where(better, new, objective[active])
        residuals = np.where(better[:, None], r, residuals)
        jacobian = np.where(better[:, None, None], j, jacobian)
        turned = ~exact[active] & (progress < 1e-2)
        exact[active] |= turned
        damping[active] = np.where(turned, 1e-3, np.clip(damping[active], 1e-12, 1e12))
        floor = 1e-26 * w.sum(-1)
        small = (gain < tolerance * objective[active]) | (objective[active] < floor)
        keep = ~((small & ~turned & exact[active]) | (damping[active] >= 1e9))
        active, residuals, jacobian = active[keep], residuals[keep], jacobian[keep]
    settled = np.ones(len(u), bool)
    settled[active] = False
    return best, objective, settled


def multistart(
    problem: Problem, starts: np.ndarray, path: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Screens all starts, polishes some: end points, objectives, which settled, how many screened.

    `path` is the delta of each stage: absolute deviations are reached through ever smaller ones,
    each of which is smooth enough for Newton's method.
    """
    low, high = problem.bounds
    starts = np.where(problem.free, np.clip(starts, low, high), starts)
    ones = np.ones((1, len(problem.target)))
    first = problem.objective(starts, ones, path[0])
    order = np.argsort(first, kind="stable")
    order = order[: max(1, int(np.isfinite(first).sum()))]
    if len(order) > POLISHED:
        half = POLISHED // 2
        spread = np.linspace(half, len(order) - 1, half).astype(int)
        order = np.concatenate([order[:half], order[spread]])
    u = starts[order]
    weights = np.ones((len(u), len(problem.target)))
    for delta in path:
        u, objectives, settled = minimise(problem, u, weights=weights, delta=delta, iterations=28)
    # Some stop at a kink of the objective, and go on when they begin anew; a crawl that is still
    # going is no optimum, unless it is the best: that one gets to its end.
    for count, iterations in ((8, 28), (2, 400)):
        top = np.argsort(objectives, kind="stable")[:count]
        u[top], objectives[top], settled[top] = minimise(
            problem, u[top], weights=weights[top], delta=path[-1], iterations=iterations
        )
    if not np.isfinite(objectives).any():
        raise ValueError(f"{problem.law.name} is not finite on these runs from any start")
    return u, objectives, settled, len(starts)
