"""The whole analysis of a sweep: predict the largest run before looking at it, then fit all laws.

Order matters and is kept by construction: the largest run is set aside, the laws are fitted to the
rest, their predictions with intervals are fixed, and only then is the measured loss read. The law
of the headline (Chinchilla's) and its interval (95 %) are chosen before any data is seen.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from scaling.envelope import Frontier, fit_envelope
from scaling.fit import Fit, fit
from scaling.isoflop import bias, fit_isoflop
from scaling.runs import Runs

HEADLINE = "chinchilla"
LEVEL = 0.95
FEW_SIZES = 3  # fewer sizes left than this, and a law in N cannot be fitted without the largest


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One held-out run: what a law said, and what was measured. Losses in nats per token."""

    law: str
    run_id: str
    params: float
    tokens: float
    flops: float
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted against measured, relative."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool:
        """Whether the measured loss lies within the interval."""
        return self.low <= self.measured <= self.high

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the error and the verdict."""
        return dict(vars(self)) | {"relative_error": self.error, "inside": self.inside}


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Everything that was concluded from a sweep.

    Attributes:
      runs: the runs analysed.
      curves: loss curves (run_id, step, tokens, flops, loss), or None.
      held: which runs were set aside for the forecast, (R,) bool.
      held_why: the rule by which they were, in words.
      forecasts: for each law, one `Forecast` per held-out run, by rising FLOPs.
      forecast_fits: the fits behind them, on the other runs only.
      fits: final fits, on all runs, by law.
      frontiers: "envelope" and "isoflop", where the runs allow them.
      exponents: the exponent a of N* = G C^a by approach and FLOP convention.
      isoflop_bias: see `scaling.isoflop.bias`; None where it cannot be said.
      warnings: in plain words.
    """

    runs: Runs
    curves: pa.Table | None
    held: np.ndarray
    held_why: str
    forecasts: dict[str, tuple[Forecast, ...]]
    forecast_fits: dict[str, Fit]
    fits: dict[str, Fit]
    frontiers: dict[str, Frontier]
    exponents: tuple[dict[str, Any], ...]
    isoflop_bias: dict[str, float] | None
    warnings: tuple[str, ...]

    @property
    def headline(self) -> Forecast:
        """The forecast of the largest run."""
        return self.forecasts[HEADLINE][-1]

    def to_json(self) -> dict[str, Any]:
        """What fit.json holds: deterministic, no timings."""
        return {
            "schema": 1,
            "n_runs": len(self.runs),
            "dropped": [{"reason": reason, "n": n} for reason, n in self.runs.dropped],
            "flops_convention": self.runs.flops_convention,
            "headline": self.headline.to_json(),
            "holdout": {
                "rule": self.held_why,
                "n_runs": int(self.held.sum()),
                "forecasts": {k: [f.to_json() for f in v] for k, v in self.forecasts.items()},
                "scores": {law: _score(v) for law, v in self.forecasts.items()},
                "fits": {
                    k: fitted.to_json(draws=False) for k, fitted in self.forecast_fits.items()
                },
            },
            "laws": {
                law: fitted.to_json(draws=law == HEADLINE) for law, fitted in self.fits.items()
            },
            "approaches": {name: f.to_json() for name, f in self.frontiers.items()},
            "exponents": list(self.exponents),
            "isoflop_bias": self.isoflop_bias,
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """A short summary for a terminal."""
        sizes, top = np.unique(self.runs["params"]), self.headline
        fitted = self.forecast_fits[HEADLINE]
        out = [
            f"Runs        {len(self.runs)} of {len(sizes)} sizes, {quantity(sizes[0])} to "
            f"{quantity(sizes[-1])} parameters; FLOPs counted as {self.runs.flops_convention}",
            f"Held out    {self.held_why}",
            f"Predicted   {top.predicted:.4f} nats per token, 95 % interval {top.low:.4f} to "
            f"{top.high:.4f} ({fitted.law.name} on {fitted.n_runs} smaller runs)",
            f"Measured    {top.measured:.4f} nats per token: {verdict(top)}",
        ]
        for name, done in self.fits.items():
            values = ", ".join(_value(done, parameter) for parameter in done.law.names)
            out.append(f"{name:<11} {values}")
        for row in self.exponents:
            if row["headline"]:
                span = row["interval"]
                text = f" [{span[0]:.3f}, {span[1]:.3f}]" if span else ""
                out.append(f"N* ~ C^a    a = {row['a']:.3f}{text} by {row['approach']}")
        return out + [f"Warning     {text}" for text in self.warnings]


def study(
    runs: Runs,
    curves: pa.Table | None = None,
    *,
    holdout: str | None = None,
    bootstrap: int = 1000,
    group: str | None = None,
    seed: int = 0,
) -> Study:
    """Analyses a sweep.

    By default the run of most FLOPs is held out *together with every run of its model size*. To
    leave its shorter runs in would turn the test into an extrapolation in tokens at a size already
    seen; and where one training run gives several budgets by cool-downs they share its trunk, so a
    shorter branch has seen the held-out run's own weights. Without them nothing of the headline's
    size nor of its compute was fitted: it is an extrapolation in both. If fewer than 3 sizes would
    be left, only the runs of more than half its FLOPs are held out, and the reason says so.

    Args:
      runs: from `read_runs`; runs whose learning rate was not decayed are left out where a column
        `decayed` marks them and others were.
      curves: loss curves, for the figures.
      holdout: an expression such as 'flops>1e21' instead of the rule above.
      bootstrap: replicates behind every interval.
      group: a column whose values the bootstrap draws whole, where rows are points of one curve.
      seed: of the resampling.

    Raises:
      ValueError: too few runs for the laws, or a holdout that names none or nearly all.
    """
    if bootstrap < 2:
        raise ValueError(
            f"bootstrap: wanted 2 replicates or more for the intervals, got {bootstrap}"
        )
    runs = _comparable(runs)
    held, why = _hold_out(runs, holdout)
    small = "params_no_embed" in runs and bool(np.isfinite(runs["params_no_embed"]).all())
    # Each law counts N as its paper does: Kaplan et al. section 1.3 without embeddings, Hoffmann et
    # al. with them.
    column = {"chinchilla": "params"} | dict.fromkeys(
        ("kaplan_n", "kaplan_d", "kaplan_nd"), "params_no_embed" if small else "params"
    )

    def fitted(law: str, chosen: Runs) -> Fit:
        return fit(chosen, law, bootstrap=bootstrap, group=group, seed=seed, params=column[law])

    train = runs.take(~held)
    forecast_fits = {law: fitted(law, train) for law in ("chinchilla", "kaplan_nd")}
    forecasts = {
        law: _forecast(done, runs.take(held), column[law]) for law, done in forecast_fits.items()
    }
    alone = {"kaplan_n": column["kaplan_n"], "kaplan_d": "tokens"}
    fits, frontiers, warnings = {}, {}, list(runs.warnings)
    for law in ("kaplan_n", "kaplan_d", "kaplan_nd", "chinchilla"):
        chosen = runs.take(unbeaten(runs, alone[law])) if law in alone else runs
        try:
            fits[law] = fitted(law, chosen)
        except ValueError as error:
            warnings.append(str(error))
    approaches = {
        "envelope": lambda: fit_envelope(runs, bootstrap=bootstrap, group=group, seed=seed),
        "isoflop": lambda: fit_isoflop(runs, bootstrap=bootstrap, seed=seed),
    }
    for name, approach in approaches.items():
        try:
            frontiers[name] = approach()
        except ValueError as error:
            warnings.append(str(error))
    for texts in [f.warnings for f in fits.values()] + [f.warnings for f in frontiers.values()]:
        warnings.extend(texts)
    estimated = None
    if "isoflop" in frontiers and "chinchilla" in fits:
        try:
            estimated = bias(runs, fits["chinchilla"])
        except ValueError as error:
            warnings.append(f"the bias of approach 2 cannot be estimated: {error}")
    result = Study(
        runs=runs,
        curves=curves,
        held=held,
        held_why=why,
        forecasts=forecasts,
        forecast_fits=forecast_fits,
        fits=fits,
        frontiers=frontiers,
        exponents=tuple(_exponents(runs, fits, frontiers, small)),
        isoflop_bias=estimated,
        warnings=(),
    )
    warnings.extend(_cautions(result))
    return replace(result, warnings=tuple(dict.fromkeys(warnings)))


def unbeaten(runs: Runs, column: str) -> np.ndarray:
    """Runs that no run with as little or less of `column` beats, (R,) bool.

    The nearest that a sweep has to "limited by N alone" (or by D alone): at each N the longest
    training, at each D the largest model.
    """
    size, loss = runs[column], runs["loss"]
    order = np.lexsort([loss, size])
    best, keep = np.inf, np.zeros(len(runs), bool)
    for i in order:
        if loss[i] < best:
            best, keep[i] = loss[i], True
    return keep


def quantity(value: int | float) -> str:
    """A count for people: 12.3k, 4.56M, 7.8B; powers of ten from 1e15."""
    if abs(value) >= 1e15:
        return f"{value:.2g}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def verdict(forecast: Forecast) -> str:
    """One clause: how far off, and whether inside the interval."""
    where = "inside the interval" if forecast.inside else "OUTSIDE the interval"
    side = "high" if forecast.error > 0 else "low"
    return f"{where}, predicted {abs(forecast.error):.2%} too {side}"


def _value(done: Fit, name: str) -> str:
    value = done.parameters[name]
    if not done.intervals:
        return f"{name} {value:.4g}"
    low, high = done.intervals[name]
    return f"{name} {value:.4g} [{low:.4g}, {high:.4g}]"


def _comparable(runs: Runs) -> Runs:
    """Without the runs whose learning rate was never decayed: their losses are of another kind."""
    if "decayed" not in runs:
        return runs
    values = runs["decayed"]
    decayed = np.array([str(v).strip().lower() in ("true", "1", "1.0", "yes") for v in values])
    if decayed.all() or not decayed.any():
        return runs
    reason = ("learning rate not decayed", int((~decayed).sum()))
    return replace(runs.take(decayed), dropped=(*runs.dropped, reason))


def _hold_out(runs: Runs, holdout: str | None) -> tuple[np.ndarray, str]:
    """Which runs are set aside, and the rule in words."""
    flops, params = runs["flops"], runs["params"]
    top = int(np.argmax(flops))
    if holdout is not None:
        held = runs.mask(holdout)
        if not held.any() or held.all():
            raise ValueError(
                f"the holdout {holdout!r} names {held.sum()} of {len(runs)} runs: it must name "
                "some and leave some"
            )
        why = f"{_runs(held)}: {holdout}"
    else:
        held = params == params[top]
        why = f"{_runs(held)} of the largest run's size, {quantity(params[top])} parameters"
        if len(np.unique(params[~held])) < FEW_SIZES:
            held = flops > flops[top] / 2
            why = (
                f"{_runs(held)} of more than half the largest run's FLOPs (without its whole "
                f"size fewer than {FEW_SIZES} sizes would be left)"
            )
    beyond = flops[held].max() / flops[~held].max() if (~held).any() else np.nan
    far = f"{beyond:.2g} times the FLOPs of" if beyond > 1.05 else "as many FLOPs as"
    return held, f"{why}; the largest has {far} any run fitted"


def _runs(held: np.ndarray) -> str:
    return "the one run" if held.sum() == 1 else f"all {held.sum()} runs"


def _forecast(done: Fit, held: Runs, column: str) -> tuple[Forecast, ...]:
    """Predictions first; the measured losses are read only to be set beside them."""
    held = held.take(np.argsort(held["flops"], kind="stable"))
    predicted = done.predict(params=held[column], tokens=held["tokens"], interval=LEVEL, noise=True)
    names = held["run_id"] if "run_id" in held else np.arange(len(held))
    return tuple(
        Forecast(
            law=done.law.name,
            run_id=str(names[i]),
            params=float(held["params"][i]),
            tokens=float(held["tokens"][i]),
            flops=float(held["flops"][i]),
            predicted=float(predicted.loss[i]),
            low=float(predicted.low[i]),
            high=float(predicted.high[i]),
            measured=float(held["loss"][i]),
        )
        for i in range(len(held))
    )


def _score(forecasts: tuple[Forecast, ...]) -> dict[str, float]:
    errors = np.array([f.error for f in forecasts])
    return {
        "mean_abs_relative_error": float(np.abs(errors).mean()),
        "bias": float(errors.mean()),
        "coverage": float(np.mean([f.inside for f in forecasts])),
    }


def _slope(done: Fit) -> tuple[float, list[float] | None]:
    """The exponent a of N* = G C^a of a Chinchilla fit at cost C = k N^p D, with its interval."""

    def at(alpha: Any, beta: Any) -> Any:
        return beta / (alpha + done.cost[1] * beta)

    value = float(at(done.parameters["alpha"], done.parameters["beta"]))
    if not done.draws:
        return value, None
    spread = at(done.draws["alpha"], done.draws["beta"])
    return value, [float(v) for v in np.quantile(spread, [0.025, 0.975])]


def _exponents(
    runs: Runs, fits: dict[str, Fit], frontiers: dict[str, Frontier], small: bool
) -> list[dict[str, Any]]:
    """Exponents a by approach; then again under each FLOP convention that the table allows."""
    rows = []

    def add(approach: str, convention: str, a: float, span: Any, headline: bool) -> None:
        span = list(span) if span else None
        rows.append(
            dict(approach=approach, convention=convention, a=a, interval=span, headline=headline)
        )

    for name, number in (("envelope", 1), ("isoflop", 2)):
        if name in frontiers:
            done = frontiers[name]
            span = done.intervals.get("a")
            add(
                f"approach {number}, {name}",
                runs.flops_convention,
                done.parameters["a"],
                span,
                True,
            )
    if "chinchilla" in fits:
        add("approach 3, parametric", runs.flops_convention, *_slope(fits["chinchilla"]), True)
    others = [("6ND", "params")] if runs.flops_convention != "6ND" else []
    if small:
        others.append(("6ND without embeddings", "params_no_embed"))
    for convention, column in others:
        size, tokens = runs[column], runs["tokens"]
        recounted = runs.with_columns(params=size, flops=6 * size * tokens)
        again = replace(recounted, flops_convention=convention)
        for name, run in (
            ("approach 1, envelope", lambda r: (fit_envelope(r).parameters["a"], None)),
            ("approach 2, isoflop", lambda r: (fit_isoflop(r).parameters["a"], None)),
            ("approach 3, parametric", lambda r: _slope(fit(r, "chinchilla"))),
        ):
            try:
                add(name, convention, *run(again), False)
            except ValueError:
                continue  # the same approach under the runs' own convention has said why
    return rows


def _cautions(result: Study) -> list[str]:
    """What a careful reader would ask of the headline."""
    said, top = [], result.headline
    if not top.inside:
        said.append(
            f"the largest run lies outside its 95 % interval ({abs(top.error):.2%} from the "
            "prediction): the law of the other runs does not carry to it within their noise"
        )
    done = result.fits.get("chinchilla")
    if (
        done
        and done.certificate["identified"]
        and min(done.parameters["alpha"], done.parameters["beta"]) < 0.15
    ):
        said.append("an exponent is below 0.15: extrapolations far beyond these runs are uncertain")
    if result.isoflop_bias and abs(result.isoflop_bias["params"]) > 0.05:
        told = result.isoflop_bias
        said.append(
            "isoflop: from noise-free runs of Chinchilla's fitted law, at these sizes and budgets, "
            f"it would find a {told['a']:+.3f} off, and N* at ten times the largest budget "
            f"{told['params']:+.0%} off"
        )
    values = [row["a"] for row in result.exponents]
    if values and max(values) - min(values) > 0.1:
        said.append(
            f"the exponent of N* moves from {min(values):.2f} to {max(values):.2f} with the "
            "approach and the FLOP convention"
        )
    return said
