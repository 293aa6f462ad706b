"""Fits a scaling law to runs: multi-start, robust, certified, with bootstrap intervals.

    runs = read_runs("x.csv", where="outlier_excluded==0")
    law = fit(runs, "chinchilla", bootstrap=4000)
    law.parameters, law.intervals, law.certificate
    law.predict(params=70e9, tokens=1.4e12, interval=0.95)
    law.optimal(flops=1e24, interval=0.95)

The objective is the *sum* of Huber terms of log-loss residuals (Hoffmann et al. 2022, equation 3;
the mean makes minimisers stop early). The law's whole grid of starts is screened; the best and a
spread of the rest are polished; no answer is taken on the solver's word: see `certify`.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scaling.laws import LAWS, Law
from scaling.runs import Runs
from scaling.solver import Problem, huber, minimise

POLISHED = 32  # starts that are followed to their end: half the best, half spread over the rest
BLOCK = 256  # bootstrap replicates per solver call: keeps its working set small
AGREE = 1e-6  # relative: objectives this close are the same optimum
ROUNDING = 1e-8  # residuals of log loss below this are zero: far under any seed's noise


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted loss, nats per token, with its interval where one was asked for."""

    loss: Any
    low: Any = None
    high: Any = None


@dataclass(frozen=True, kw_only=True)
class Optimal:
    """The compute-optimal allocation of some FLOPs; intervals are {name: (low, high)}."""

    flops: Any
    params: Any
    tokens: Any
    loss: Any
    intervals: dict[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """One law fitted to one set of runs.

    Attributes:
      law: what was fitted.
      parameters: natural units, under the law's names.
      objective: what was minimised: a sum of Huber terms, of |r| (l1) or of r^2 (mse).
      loss: "huber", "l1" or "mse".
      delta: Huber's delta, in units of the residual; None for the others.
      linear: residuals of the loss instead of its logarithm.
      n_runs: runs fitted.
      residuals: log(predicted / measured), or their difference when linear, (R,).
      draws: bootstrap replicates of each parameter, {name: (B,)}; empty without bootstrap.
      intervals: 95 % percentile intervals of the parameters.
      standard_errors: standard deviations of the draws.
      certificate: see `certify`.
      cost: (k, p): a run costs k N^p D FLOPs, measured from the runs' own FLOPs; (6, 1) is 6ND.
      flops_convention: how those FLOPs were counted.
      flops_max: the largest run fitted, to say how far an answer extrapolates.
      holdout: errors on the runs that were held out, if any.
      dropped: rows of the table that were not used, with reasons.
      warnings: in plain words.
    """

    law: Law
    parameters: dict[str, float]
    objective: float
    loss: str
    delta: float | None
    linear: bool
    n_runs: int
    residuals: Float[np.ndarray, "R"]
    draws: dict[str, np.ndarray]
    intervals: dict[str, tuple[float, float]]
    standard_errors: dict[str, float]
    certificate: dict[str, Any]
    cost: tuple[float, float]
    flops_convention: str
    flops_max: float
    holdout: dict[str, Any] | None
    dropped: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...]

    def predict(
        self, *, interval: float | None = None, noise: bool = False, **columns: Any
    ) -> Prediction:
        """The law's loss at some runs.

        Args:
          interval: coverage of the interval, such as 0.95; needs bootstrap draws.
          noise: the interval is for the loss that a new run would measure, seeds and all, instead
            of the law's mean: the residuals of the fit, inflated by sqrt(n / (n - p)), are added.
          **columns: the law's columns: params=, tokens=, ...; numbers or arrays that broadcast.
        """
        if missing := [name for name in self.law.columns if name not in columns]:
            raise ValueError(f"{self.law.name} needs {', '.join(missing)} to predict a loss")
        used = [np.asarray(columns[name], np.float64) for name in self.law.columns]
        shape = np.broadcast_shapes(*(v.shape for v in used))
        x = {
            n: np.broadcast_to(v, shape).ravel()
            for n, v in zip(self.law.columns, used, strict=True)
        }
        loss = evaluate(self.law, self.parameters, x).reshape(shape)[()]
        if interval is None:
            return Prediction(loss=loss)
        samples = evaluate(self.law, self._drawn(), x)  # B M
        if noise:
            spare = self.n_runs - len(self.certificate["free"])
            residuals = self.residuals * np.sqrt(self.n_runs / max(spare, 1))
            thin = samples[:: max(1, samples.size * len(residuals) // 1_000_000)]
            # Residuals are predicted minus measured: a new run measures the law less a residual.
            noisy = (
                thin[:, None] - residuals[:, None]
                if self.linear
                else thin[:, None] * np.exp(-residuals)[:, None]
            )
            samples = noisy.reshape(-1, samples.shape[1])
        low, high = _quantiles(samples, interval)
        return Prediction(loss=loss, low=low.reshape(shape)[()], high=high.reshape(shape)[()])

    def optimal(self, flops: Any, *, interval: float | None = None) -> Optimal:
        """The allocation of `flops` that the law predicts to be best: argmin L(N, D) at cost C.

        D follows from the cost of the fitted runs, D = C / (k N^p), so the answer is in the
        convention of their FLOPs.
        """
        if set(self.law.columns) != {"params", "tokens"}:
            raise ValueError(
                f"{self.law.name} has no optimum: it is not a law of params and tokens"
            )
        budget = np.asarray(flops, np.float64)
        best = _allocate(self.law, self.parameters, self.cost, budget.ravel())
        intervals = {}
        if interval is not None:
            draws = _allocate(self.law, self._drawn(), self.cost, budget.ravel())
            for name, values in draws.items():
                low, high = _quantiles(values, interval)
                intervals[name] = (low.reshape(budget.shape)[()], high.reshape(budget.shape)[()])
        at = {name: values.reshape(budget.shape)[()] for name, values in best.items()}
        return Optimal(flops=budget[()], intervals=intervals, **at)

    def _drawn(self) -> dict[str, np.ndarray]:
        if not self.draws:
            raise ValueError("an interval needs a bootstrap: fit(..., bootstrap=1000)")
        return {name: values[:, None] for name, values in self.draws.items()}

    def to_json(self) -> dict[str, Any]:
        """The fit as plain Python values; the optimum is given at the largest budget and beyond."""
        optimal = []
        if set(self.law.columns) == {"params", "tokens"}:
            budgets = self.flops_max * np.array([1.0, 10.0, 100.0])
            best = self.optimal(budgets, interval=0.95 if self.draws else None)
            for i in range(len(budgets)):
                row = {n: float(getattr(best, n)[i]) for n in ("flops", "params", "tokens", "loss")}
                spans = {n: [float(v[i]) for v in span] for n, span in best.intervals.items()}
                optimal.append(row | {"intervals": spans})
        return {
            "law": self.law.name,
            "parameters": self.parameters,
            "objective": self.objective,
            "loss": self.loss,
            "delta": self.delta,
            "linear": self.linear,
            "n_runs": self.n_runs,
            "dropped": [{"reason": reason, "n": n} for reason, n in self.dropped],
            "certificate": self.certificate,
            "intervals": {name: list(span) for name, span in self.intervals.items()},
            "standard_errors": self.standard_errors,
            "bootstrap": len(next(iter(self.draws.values()), ())),
            "holdout": self.holdout,
            "optimal": optimal,
            "cost": {"flops_per_token_coefficient": self.cost[0], "params_exponent": self.cost[1]},
            "flops_convention": self.flops_convention,
            "warnings": list(self.warnings),
        }


def fit(
    runs: Runs,
    law: str | Law = "chinchilla",
    *,
    loss: str = "huber",
    delta: float = 1e-3,
    linear: bool = False,
    fix: Mapping[str, float] | None = None,
    holdout: str | np.ndarray | None = None,
    bootstrap: int = 0,
    group: str | None = None,
    seed: int = 0,
    params: str = "params",
) -> Fit:
    """Fits a law to runs.

    Args:
      runs: from `read_runs`.
      law: a name in `LAWS`, or a `Law`.
      loss: "huber", "l1" (least absolute deviations) or "mse" (least squares); all are sums.
      delta: Huber's delta; 1e-3 on log loss is Hoffmann et al. 2022, section 3.3.
      linear: residuals of the loss itself, not of its logarithm.
      fix: parameters held at a value, in natural units.
      holdout: runs kept out of the fit and scored: an expression such as 'flops>1e21', or a mask.
      bootstrap: replicates for the intervals; 0 for none.
      group: a column whose values are resampled whole (points of one curve are not independent).
      seed: of the resampling.
      params: the column that the law reads as N, such as "params_no_embed".

    Raises:
      ValueError: an unknown law or parameter, or too few runs.
    """
    law = _law(law)
    fixed = dict(fix or {})
    if unknown := [name for name in fixed if name not in law.names]:
        raise ValueError(
            f"{law.name} has no parameter {unknown[0]!r} to fix: it has {', '.join(law.names)}"
        )
    if missing := [name for name in law.given if name not in fixed]:
        raise ValueError(
            f"{law.name} wants {missing[0]} fixed, as in --fix {missing[0]}=1.8"
            f" or fix={{{missing[0]!r}: 1.8}}"
        )
    if loss not in ("huber", "l1", "mse"):
        raise ValueError(f"loss: wanted huber, l1 or mse, got {loss!r}")
    if loss == "huber" and not delta > 0:
        raise ValueError(f"delta: wanted a positive number, got {delta}")
    if params not in runs:
        raise ValueError(
            f"no column {params!r}: the table has {', '.join(runs.table.column_names)}"
        )
    out = np.zeros(len(runs), bool)
    if holdout is not None:
        out = runs.mask(holdout) if isinstance(holdout, str) else np.asarray(holdout, bool)
        if not out.any():
            raise ValueError(f"the holdout {holdout!r} names none of the {len(runs)} runs")
    train = runs.take(~out)
    free = np.array([name not in fixed for name in law.names])
    if len(train) <= free.sum():
        raise ValueError(
            f"{law.name} has {free.sum()} free parameters and needs more runs than that, got "
            f"{len(train)}: add runs or fix parameters"
        )
    problem = Problem(
        law=law, x=_columns(law, train, params), loss=train["loss"], linear=linear, free=free
    )
    path = {"huber": (delta,), "mse": (np.inf,), "l1": (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)}[loss]
    starts = law.starts(problem.x, problem.loss) | {k: np.float64(v) for k, v in fixed.items()}
    u, objectives, settled, screened = _multistart(
        problem, np.atleast_2d(problem.internal(starts)), path
    )
    best = u[np.argmin(objectives)]
    certificate = certify(problem, best, path[-1], objectives, settled, screened)
    warnings = [*runs.warnings, *_warnings(law, certificate)]
    draws: dict[str, np.ndarray] = {}
    if bootstrap:
        groups = train[group] if group else None
        weights = resample(len(train), bootstrap, seed, groups)
        draws, moving = _bootstrap(problem, best, weights, path[-1], loss)
        if moving > bootstrap / 20:
            warnings.append(
                f"{law.name}: {moving} of {bootstrap} bootstrap refits had not settled: resampled, "
                "these runs hardly determine the law, and its intervals are rough"
            )
    residuals = problem.evaluate(best[None])[0][0]
    result = Fit(
        law=law,
        parameters={name: float(v) for name, v in problem.natural(best).items()} | fixed,
        objective=_reported(residuals, loss, delta),
        loss=loss,
        delta=delta if loss == "huber" else None,
        linear=linear,
        n_runs=len(train),
        residuals=residuals,
        draws=draws,
        intervals={k: _interval(v) for k, v in draws.items()},
        standard_errors={k: float(np.std(v, ddof=1)) for k, v in draws.items()},
        certificate=certificate,
        cost=_cost(train, params),
        flops_convention=runs.flops_convention,
        flops_max=float(train["flops"].max()),
        holdout=None,
        dropped=runs.dropped,
        warnings=tuple(warnings),
    )
    if out.any():
        result = replace(result, holdout=score(result, runs.take(out), params))
    return result


def score(fitted: Fit, runs: Runs, params: str = "params") -> dict[str, Any]:
    """Errors on runs that the fit has not seen: relative to the measured loss; coverage of 95 %."""
    x = _columns(fitted.law, runs, params)
    measured = runs["loss"]
    with_interval = fitted.predict(
        interval=0.95 if fitted.draws else None, noise=bool(fitted.draws), **x
    )
    error = with_interval.loss / measured - 1
    inside = (
        float(np.mean((with_interval.low <= measured) & (measured <= with_interval.high)))
        if fitted.draws
        else None
    )
    return {
        "n_runs": len(runs),
        "mean_abs_relative_error": float(np.mean(np.abs(error))),
        "bias": float(np.mean(error)),
        "coverage": inside,
    }


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


def certify(
    problem: Problem,
    u: Float[np.ndarray, "P"],
    delta: float,
    objectives: np.ndarray,
    settled: np.ndarray,
    screened: int,
) -> dict[str, Any]:
    """What speaks for an optimum, measured afresh at the answer.

    relative_gradient: the largest cosine between the clipped residuals and a column of the
      Jacobian, over free parameters inside their bounds (MINPACK's gtol); 0 at a stationary point.
    starts, screened: starts followed to the end, and those they were chosen from.
    starts_at_optimum: how many of them ended within 1e-6 of the best objective.
    runner_up_gap: how much worse the next local optimum is, relative; None if all ended at one.
    at_bound: parameters that stopped at a bound (E there: the runs show no floor).
    not_identified: parameters that these runs do not determine: at a bound, along a direction in
      which the residuals do not change (a ridge), or with a standard error above 1 for a
      logarithm (a factor of 7 either way) or above half of an exponent.
    identified: none of those.
    """
    residuals, jacobian = (a[0] for a in problem.evaluate(u[None]))
    low, high = problem.bounds
    at_bound = problem.free & ((u <= low + 1e-9) | (u >= high - 1e-9))
    inside = problem.free & ~at_bound
    pull = np.clip(residuals, -delta, delta)
    length = np.linalg.norm(jacobian, axis=0)
    reach = np.linalg.norm(pull) + ROUNDING * np.sqrt(len(pull))
    cosine = np.abs(pull @ jacobian) / (reach * np.maximum(length, 1e-300))

    # Standard errors from the curvature of least squares, with a robust scale of the residuals.
    spread = 1.4826 * np.median(np.abs(residuals - np.median(residuals)))
    n, p = len(residuals), int(problem.free.sum())
    spread = max(spread * np.sqrt(n / (n - p)), ROUNDING)
    j = jacobian[:, inside] / np.maximum(length[inside], 1e-300)
    values, vectors = np.linalg.eigh(j.T @ j)
    flat = values < 1e-12
    ridge = (np.abs(vectors[:, flat]) > 0.1).any(1)
    inverse = np.where(flat, 0.0, 1 / np.maximum(values, 1e-12))
    error = spread * np.sqrt((vectors**2) @ inverse) / np.maximum(length[inside], 1e-300)
    names = np.array(problem.law.names)
    log = np.array([parameter.log for parameter in problem.law.parameters])
    vague = error > np.where(log, 1.0, 0.5 * np.abs(u))[inside]
    lost = set(names[at_bound]) | set(names[inside][ridge | vague])
    best = objectives.min()
    floor = len(residuals) * 0.5 * min(ROUNDING, delta) ** 2
    same = objectives <= best * (1 + AGREE) + floor
    others = objectives[settled & ~same]
    return {
        "relative_gradient": float(cosine[inside].max(initial=0.0)),
        "starts": len(objectives),
        "screened": screened,
        "starts_at_optimum": int(same.sum()),
        "runner_up_gap": float(others.min() / max(best, floor) - 1) if others.size else None,
        "at_bound": [str(name) for name in names[at_bound]],
        "free": [str(name) for name in names[problem.free]],
        "not_identified": [name for name in problem.law.names if name in lost],
        "identified": not lost,
    }


def evaluate(law: Law, parameters: Mapping[str, Any], x: Mapping[str, Any]) -> np.ndarray:
    """A law's loss in float64: scalar or (B, 1) parameters, columns (M,) -> (M,) or (B, M)."""
    batched = any(np.ndim(v) for v in parameters.values())
    columns = {k: np.asarray(np.atleast_2d(v) if batched else v, np.float64) for k, v in x.items()}
    values = {name: np.asarray(v, np.float64) for name, v in parameters.items()}
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(_apply(columns, values, law=law))


@partial(jax.jit, static_argnames="law")
def _apply(columns: Any, parameters: Any, *, law: Law) -> Any:
    return law.function(columns, **parameters)


def _law(law: str | Law) -> Law:
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise ValueError(f"no law {law!r}: there are {', '.join(LAWS)}")
    return LAWS[law]


def _columns(law: Law, runs: Runs, params: str) -> dict[str, np.ndarray]:
    missing = [c for c in law.columns if (params if c == "params" else c) not in runs]
    if missing:
        raise ValueError(f"{law.name} needs a column {missing[0]!r}")
    return {name: runs[params if name == "params" else name] for name in law.columns}


def _multistart(
    problem: Problem, starts: np.ndarray, path: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Screens all starts, polishes some: end points, objectives, which settled, how many screened.

    `path` is the delta of each stage: absolute deviations are reached through ever smaller ones,
    each of which is smooth enough for Newton's method.
    """
    low, high = problem.bounds
    starts = np.where(problem.free, np.clip(starts, low, high), starts)
    ones = np.ones((1, len(problem.loss)))
    first = problem.objective(starts, ones, path[0])
    order = np.argsort(first, kind="stable")
    order = order[: max(1, int(np.isfinite(first).sum()))]
    if len(order) > POLISHED:
        half = POLISHED // 2
        spread = np.linspace(half, len(order) - 1, half).astype(int)
        order = np.concatenate([order[:half], order[spread]])
    u = starts[order]
    weights = np.ones((len(u), len(problem.loss)))
    for delta in path:
        u, objectives, settled = minimise(problem, u, weights=weights, delta=delta, iterations=28)
    # A crawl that is still going is no optimum, unless it is the best: that one gets to its end.
    top = np.argsort(objectives, kind="stable")[:2]
    u[top], objectives[top], settled[top] = minimise(
        problem, u[top], weights=weights[top], delta=path[-1], iterations=400
    )
    if not np.isfinite(objectives).any():
        raise ValueError(f"{problem.law.name} is not finite on these runs from any start")
    return u, objectives, settled, len(starts)


def _bootstrap(
    problem: Problem, u: np.ndarray, weights: np.ndarray, delta: float, loss: str
) -> tuple[dict[str, np.ndarray], int]:
    """Refits under each row of weights, from the optimum; and how many were still moving."""
    # Least absolute deviations: smooth enough to converge, sharp enough (1e-5 nats) for intervals.
    delta = max(delta, 1e-5) if loss == "l1" else delta

    def block(begin: int) -> tuple[np.ndarray, np.ndarray]:
        part = weights[begin : begin + BLOCK]
        start = np.repeat(u[None], len(part), axis=0)
        end, _, settled = minimise(
            problem, start, weights=part, delta=delta, iterations=60, tolerance=1e-9
        )
        return end, settled

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        ends, settled = zip(*pool.map(block, range(0, len(weights), BLOCK)), strict=True)
    return problem.natural(np.concatenate(ends)), int((~np.concatenate(settled)).sum())


def _reported(residuals: np.ndarray, loss: str, delta: float) -> float:
    terms = {"huber": huber(residuals, delta), "l1": np.abs(residuals), "mse": residuals**2}
    return float(np.sum(terms[loss]))


def _quantiles(values: np.ndarray, interval: float) -> tuple[np.ndarray, np.ndarray]:
    tail = (1 - interval) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = _quantiles(values, 0.95)
    return float(low), float(high)


def _cost(runs: Runs, params: str) -> tuple[float, float]:
    """FLOPs per token as k N^p, by least squares on the runs; exactly (6, 1) for 6ND."""
    n, rate = np.log(runs[params]), np.log(runs["flops"] / runs["tokens"])
    if np.ptp(rate - n) < 1e-6 or np.ptp(n) < 1e-9:
        return float(np.exp(np.mean(rate - n))), 1.0
    p, k = np.polyfit(n, rate, 1)
    return float(np.exp(k)), float(p)


def _allocate(
    law: Law, parameters: Mapping[str, Any], cost: tuple[float, float], flops: np.ndarray
) -> dict[str, np.ndarray]:
    """Best N, D and loss at each budget: parameters (B, 1) or scalars -> (B, M) or (M,)."""
    batched = any(np.ndim(v) for v in parameters.values())
    budget = flops[None] if batched else flops
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        values = {name: jnp.asarray(v, jnp.float64) for name, v in parameters.items()}
        size, tokens, loss = _bisect(
            values,
            jnp.asarray(budget, jnp.float64),
            jnp.float64(cost[0]),
            jnp.float64(cost[1]),
            law=law,
        )
    return {"params": np.asarray(size), "tokens": np.asarray(tokens), "loss": np.asarray(loss)}


@partial(jax.jit, static_argnames="law")
def _bisect(parameters: Any, flops: Any, k: Any, p: Any, *, law: Law) -> Any:
    """Where d loss / d log N changes sign along C = k N^p D, by bisection over e^80."""

    def along(log_n: Any) -> Any:
        tokens = flops / (k * jnp.exp(p * log_n))
        return law.function({"params": jnp.exp(log_n), "tokens": tokens}, **parameters)

    def halve(_: Any, bracket: Any) -> Any:
        low, high = bracket
        middle = (low + high) / 2
        _, slope = jax.jvp(along, (middle,), (jnp.ones_like(middle),))
        return jnp.where(slope < 0, middle, low), jnp.where(slope < 0, high, middle)

    shape = jnp.broadcast_shapes(flops.shape, *(jnp.shape(v) for v in parameters.values()))
    even = jnp.broadcast_to(jnp.log(flops / k) / (1 + p), shape)
    low, high = jax.lax.fori_loop(0, 64, halve, (even - 40.0, even + 40.0))
    log_n = (low + high) / 2
    return jnp.exp(log_n), flops / (k * jnp.exp(p * log_n)), along(log_n)


def _warnings(law: Law, certificate: Mapping[str, Any]) -> tuple[str, ...]:
    said = []
    if "E" in certificate["at_bound"]:
        said.append(f"{law.name}: E went to zero: these runs show no floor")
    if others := [n for n in certificate["not_identified"] if n not in certificate["at_bound"]]:
        said.append(f"{law.name}: these runs do not determine {', '.join(others)}")
    if certificate["starts_at_optimum"] < 2:
        said.append(
            f"{law.name}: only one start reached the best objective: it may not be the best"
        )
    if certificate["relative_gradient"] > 1e-4:
        said.append(f"{law.name}: the gradient is not zero: the fit is not at an optimum")
    return tuple(said)
