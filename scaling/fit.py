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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from scaling.allocation import Optimal, allocate, training_cost
from scaling.certificate import certify, warnings
from scaling.laws import LAWS, Law, evaluate
from scaling.runs import Runs
from scaling.solver import Problem, huber, multistart
from scaling.uncertainty import RESAMPLING, Profile, bootstrap_draws, profile_likelihood

EXPONENTS = ("alpha", "beta", "alpha_N", "alpha_D")
FAR = 100.0  # times the FLOPs of the largest run: two decades, and an answer says how far it is


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted loss, nats per token (or the law's other target), with the interval asked for."""

    loss: Any
    low: Any = None
    high: Any = None


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
      profiles: the profile likelihoods that were asked for, by parameter.
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
    flops_max: float | None
    holdout: dict[str, Any] | None
    dropped: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...]
    profiles: dict[str, Profile] = field(default_factory=dict)

    @property
    def has_optimum(self) -> bool:
        """Whether the law says how to divide compute: whether it is one of params and tokens."""
        return set(self.law.columns) == {"params", "tokens"}

    def predict(
        self, *, interval: float | None = None, noise: bool = False, **columns: Any
    ) -> Prediction:
        """The law's loss at some runs.

        Args:
          interval: coverage of the interval, such as 0.95; needs bootstrap draws.
          noise: the interval is for the loss that a new run would measure, seeds and all, instead
            of the law's mean: the residuals of the fit, inflated by sqrt(n / (n - p)), are added.
          **columns: the law's columns: params=, tokens=, ...; numbers or arrays that broadcast. Or
            what the law derives them from, such as run_id=, step=, learning_rate= of a schedule.
        """
        if self.law.derive and all(name in columns for name in self.law.needs):
            columns = self.law.derive({n: np.asarray(columns[n]) for n in self.law.needs})
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

    def optimal(
        self, flops: Any, *, interval: float | None = None, inference_tokens: float = 0.0
    ) -> Optimal:
        """The allocation of `flops` that the law predicts to be best: argmin L(N, D) at cost C.

        D follows from the cost of the fitted runs, D = C / (k N^p), so the answer is in the
        convention of their FLOPs. With `inference_tokens` it is the model that costs least to train
        and to serve, of those as good as the best of `flops`: see `allocate`.
        """
        if not self.has_optimum:
            raise ValueError(
                f"{self.law.name} has no optimum: it is not a law of params and tokens"
            )
        budget = np.asarray(flops, np.float64)
        if not (np.isfinite(budget).all() and (budget > 0).all() and inference_tokens >= 0):
            raise ValueError(
                "optimal: wanted positive flops and inference_tokens that are not negative, got "
                f"{flops} and {inference_tokens}"
            )

        def best(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
            return allocate(self.law, parameters, self.cost, budget.ravel(), inference_tokens)

        spans = {}
        if interval is not None:
            drawn = best(self._drawn())
            fixed = () if inference_tokens else ("flops", "inference_flops")
            for name, values in ((n, v) for n, v in drawn.items() if n not in fixed):
                low, high = _quantiles(values, interval)
                spans[name] = (low.reshape(budget.shape)[()], high.reshape(budget.shape)[()])
        found = best(self.parameters).items()
        at = {name: values.reshape(budget.shape)[()] for name, values in found}
        return Optimal(intervals=spans, **at)

    def cautions(self, flops: float) -> list[str]:
        """What to know before `flops` are spent on this fit's word."""
        said = []
        if self.flops_max and flops > FAR * self.flops_max:
            exponents = {n: v for n, v in self.parameters.items() if n in EXPONENTS and v < 0.15}
            weak = [f"{name} {value:.2g}" for name, value in exponents.items()]
            because = f", with {' and '.join(weak)}" if weak else ""
            said.append(
                f"{flops:.2g} FLOPs are {flops / self.flops_max:.2g} times the largest run fitted"
                f"{because}: the intervals hold only if the law does"
            )
        if self.certificate["not_identified"]:
            said.append(
                f"the runs do not determine {', '.join(self.certificate['not_identified'])}"
            )
        return said

    def _drawn(self) -> dict[str, np.ndarray]:
        if not self.draws:
            raise ValueError("an interval needs a bootstrap: fit(..., bootstrap=1000)")
        return {name: values[:, None] for name, values in self.draws.items()}

    def to_json(self, *, draws: bool = True) -> dict[str, Any]:
        """The fit as plain Python values; the optimum is given at the largest budget and beyond.

        With `draws`, `read_fit` gives back a fit that predicts with intervals.
        """
        optimal = []
        if self.has_optimum and self.flops_max:
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
            "flops_max": self.flops_max,
            "profiles": {name: done.to_json() for name, done in self.profiles.items()},
            "residuals": self.residuals.tolist(),
            "warnings": list(self.warnings),
            "draws": {n: [float(f"{x:.9g}") for x in v] for n, v in self.draws.items() if draws},
        }


def fit(
    runs: Runs,
    law: str | Law = "chinchilla",
    *,
    loss: str = "huber",
    delta: float = 1e-3,
    linear: bool | None = None,
    fix: Mapping[str, float] | None = None,
    holdout: str | np.ndarray | None = None,
    bootstrap: int = 0,
    resampling: str = "cases",
    group: str | None = None,
    profiles: Sequence[str] = (),
    seed: int = 0,
    params: str = "params",
) -> Fit:
    """Fits a law to runs.

    Args:
      runs: from `read_runs`.
      law: a name in `LAWS`, or a `Law`.
      loss: "huber", "l1" (least absolute deviations) or "mse" (least squares); all are sums.
      delta: Huber's delta; 1e-3 on log loss is Hoffmann et al. 2022, section 3.3.
      linear: residuals of the loss itself, not of its logarithm; by default what the law says.
      fix: parameters held at a value, in natural units.
      holdout: runs kept out of the fit and scored: an expression such as 'flops>1e21', or a mask.
      bootstrap: replicates for the intervals; 0 for none.
      resampling: what is drawn, "cases" or "residuals": see `scaling.uncertainty.bootstrap_draws`.
      group: a column whose values are resampled whole (points of one curve are not independent).
      profiles: parameters whose profile likelihood is wanted as well.
      seed: of the resampling.
      params: the column that the law reads as N, such as "params_no_embed".

    Raises:
      ValueError: an unknown law or parameter, or too few runs.
    """
    law = _law(law)
    fixed = dict(fix or {})
    _check(runs, law, fixed, loss, delta, resampling, group, profiles)
    out = np.zeros(len(runs), bool)
    if holdout is not None:
        out = runs.mask(holdout) if isinstance(holdout, str) else np.asarray(holdout, bool)
        if not out.any():
            raise ValueError(f"the holdout {holdout!r} names none of the {len(runs)} runs")
    x, train = _columns(law, runs, params), runs.take(~out)
    free = np.array([name not in fixed for name in law.names])
    if len(train) <= free.sum():
        raise ValueError(
            f"{law.name} has {free.sum()} free parameters and needs more runs than that, got "
            f"{len(train)}: add runs or fix parameters"
        )
    linear = law.linear if linear is None else linear
    problem = Problem(
        law=law,
        x={name: values[~out] for name, values in x.items()},
        target=train[law.target],
        linear=linear,
        free=free,
    )
    path = {"huber": (delta,), "mse": (np.inf,), "l1": (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)}[loss]
    starts = law.starts(problem.x, problem.target) | {k: np.float64(v) for k, v in fixed.items()}
    u, objectives, settled, screened = multistart(
        problem, np.atleast_2d(problem.internal(starts)), path
    )
    best = u[np.argmin(objectives)]
    certificate = certify(problem, best, path[-1], objectives, settled, screened)
    said = [*runs.warnings, *warnings(law, certificate)]
    draws: dict[str, np.ndarray] = {}
    if bootstrap:
        draws, moving = bootstrap_draws(
            problem,
            best,
            path[-1],
            times=bootstrap,
            seed=seed,
            resampling=resampling,
            groups=train[group] if group else None,
        )
        if moving > bootstrap / 20:
            said.append(
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
        profiles={n: profile_likelihood(problem, best, path[-1], n) for n in profiles},
        flops_convention=runs.flops_convention,
        flops_max=float(train["flops"].max()) if "flops" in train else None,
        holdout=None,
        dropped=runs.dropped,
        warnings=tuple(said),
    )
    if out.any():
        seen = {name: values[out] for name, values in x.items()}
        result = replace(result, holdout=_score(result, seen, runs[law.target][out]))
    return result


def read_fit(path: str, law: str = "chinchilla") -> Fit:
    """Reads a fit that was written as JSON: one law's, or that law's of a sweep's fit.json.

    Raises:
      ValueError: the file is no fit.
      OSError: it cannot be read.
    """
    try:
        told = json.loads(epath.Path(path).read_text())
        told = told["laws"][law] if "laws" in told else told
        if told["law"] not in LAWS:
            raise ValueError(f"{path} is a fit of {told['law']}: wanted one of {', '.join(LAWS)}")
        draws = {name: np.array(values) for name, values in told["draws"].items()}
        return Fit(
            law=LAWS[told["law"]],
            residuals=np.array(told["residuals"]),
            draws=draws,
            intervals={name: tuple(span) for name, span in told["intervals"].items()},
            cost=tuple(told["cost"].values()),
            dropped=tuple((row["reason"], row["n"]) for row in told["dropped"]),
            warnings=tuple(told["warnings"]),
            profiles={},
            **{
                name: told[name]
                for name in (
                    *("parameters", "objective", "loss", "delta", "linear", "n_runs"),
                    *("standard_errors", "certificate", "flops_convention", "flops_max", "holdout"),
                )
            },
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is not a fit: wanted the JSON that `lineage fit` or `lineage sweep` writes"
        ) from None


def _score(fitted: Fit, x: Mapping[str, np.ndarray], measured: np.ndarray) -> dict[str, Any]:
    """Errors on runs that the fit has not seen: relative to the measured loss; coverage of 95 %."""
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
        "n_runs": len(measured),
        "mean_abs_relative_error": float(np.mean(np.abs(error))),
        "bias": float(np.mean(error)),
        "coverage": inside,
    }


def _check(
    runs: Runs,
    law: Law,
    fixed: Mapping[str, float],
    loss: str,
    delta: float,
    resampling: str,
    group: str | None,
    profiles: Sequence[str],
) -> None:
    """Refuses what cannot be fitted, in one line."""
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
    if resampling not in RESAMPLING:
        raise ValueError(f"resampling: wanted {' or '.join(RESAMPLING)}, got {resampling!r}")
    if group and resampling == "residuals":
        raise ValueError("resampling residuals has no groups: wanted resampling='cases' with group")
    if group and group not in runs:
        raise ValueError(
            f"no column {group!r} to group by: the table has {', '.join(runs.table.column_names)}"
        )
    if unknown := [name for name in profiles if name not in law.names or name in fixed]:
        raise ValueError(f"{law.name} has no free parameter {unknown[0]!r} to profile")


def _law(law: str | Law) -> Law:
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise ValueError(f"no law {law!r}: there are {', '.join(LAWS)}")
    return LAWS[law]


def _columns(law: Law, runs: Runs, params: str) -> dict[str, np.ndarray]:
    wanted = [params if name == "params" else name for name in law.needs or law.columns]
    if missing := [name for name in (*wanted, law.target) if name not in runs]:
        raise ValueError(
            f"{law.name} needs a column {missing[0]!r}: the table has "
            f"{', '.join(runs.table.column_names)}"
        )
    found = {name: runs[name] for name in wanted}
    if law.derive:
        return law.derive(found)
    return dict(zip(law.columns, found.values(), strict=True))


def _cost(runs: Runs, params: str) -> tuple[float, float]:
    if any(name not in runs for name in (params, "tokens", "flops")):
        return 6.0, 1.0
    return training_cost(runs[params], runs["tokens"], runs["flops"])


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
