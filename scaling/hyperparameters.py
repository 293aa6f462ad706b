"""How the best learning rate and batch size move with N and D.

At each (N, D) the best rate is the minimum of a parabola in log rate through the best run and its
neighbours, at each batch size that was tried; the best batch size is the minimum of the same kind
through those. A minimum at the edge of what was tried is none, and is left out, by name. Then

    lr* = lr_coefficient N^lr_params_exponent D^lr_tokens_exponent
    B*  = batch_coefficient D^batch_tokens_exponent, in tokens

by least squares of the logarithms: the forms of Li et al. 2025, "Predictable Scale: Part I"
(arXiv 2503.04715), and, in compute alone, of DeepSeek-AI 2024 (arXiv 2401.02954, section 3.1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from scaling.envelope import spans
from scaling.runs import Runs


@dataclass(frozen=True, kw_only=True, eq=False)
class Hyperparameters:
    """The best learning rate and batch size as power laws.

    Attributes:
      parameters: under the names of the module's equations; those of the batch are absent if the
        runs do not vary it.
      params, tokens, learning_rate, batch_tokens: the minima through which the lines go, (K,) each;
        batch_tokens is NaN where no batch size was best.
      draws: bootstrap replicates of the parameters, {name: (B,)}.
      intervals: their 95 % percentile intervals.
      n_runs: runs looked at.
      dropped: (reason, number) of runs or settings that were not used.
      warnings: in plain words.
    """

    parameters: dict[str, float]
    params: Float[np.ndarray, "K"]
    tokens: Float[np.ndarray, "K"]
    learning_rate: Float[np.ndarray, "K"]
    batch_tokens: Float[np.ndarray, "K"]
    draws: dict[str, np.ndarray]
    intervals: dict[str, tuple[float, float]]
    n_runs: int
    dropped: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...]

    def predict(self, *, params: Any, tokens: Any) -> dict[str, Any]:
        """The best learning rate, and batch size in tokens if it was varied, at some N and D."""
        p = self.parameters
        n, d = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        powers = n ** p["lr_params_exponent"] * d ** p["lr_tokens_exponent"]
        best = {"learning_rate": (p["lr_coefficient"] * powers)[()]}
        if "batch_coefficient" in p:
            batch = p["batch_coefficient"] * d ** p["batch_tokens_exponent"]
            best["batch_tokens"] = (batch + 0 * n)[()]
        return best

    def to_json(self) -> dict[str, Any]:
        """As plain Python values, under the keys of a fit where they mean the same."""
        columns = ("params", "tokens", "learning_rate", "batch_tokens")
        points = zip(*(getattr(self, name) for name in columns), strict=True)
        rows = [dict(zip(columns, map(float, point), strict=True)) for point in points]
        return {
            "law": "hyperparameters",
            "parameters": self.parameters,
            **dict.fromkeys(("objective", "loss", "delta", "certificate", "holdout")),
            "n_runs": self.n_runs,
            "dropped": [{"reason": reason, "n": n} for reason, n in self.dropped],
            "intervals": {name: list(span) for name, span in self.intervals.items()},
            "bootstrap": len(next(iter(self.draws.values()), ())),
            "optimal": [
                {name: value for name, value in row.items() if np.isfinite(value)} for row in rows
            ],
            "flops_convention": None,
            "warnings": list(self.warnings),
        }


def fit_hyperparameters(runs: Runs, *, bootstrap: int = 0, seed: int = 0) -> Hyperparameters:
    """Fits the best learning rate and batch size of runs that varied them.

    Args:
      runs: read with duplicates="keep"; columns learning_rate and, if it was varied, batch_tokens.
      bootstrap: replicates for the intervals: residuals of the lines, drawn with replacement and
        inflated by sqrt(n / (n - p)).
      seed: of the resampling.

    Raises:
      ValueError: no column learning_rate, or fewer minima than the lines have parameters.
    """
    if "learning_rate" not in runs:
        raise ValueError(
            "hyperparameters needs a column 'learning_rate': the table has "
            f"{', '.join(runs.table.column_names)}"
        )
    n, d, rate, loss = (runs[k] for k in ("params", "tokens", "learning_rate", "loss"))
    batch = runs["batch_tokens"] if "batch_tokens" in runs else np.full(len(runs), np.nan)
    points, dropped = [], []
    for size, tokens in sorted(set(zip(n, d, strict=True))):
        rows = (n == size) & (d == tokens)
        best, problem = _best(rate[rows], batch[rows], loss[rows])
        if problem:
            dropped.append((f"N {size:.3g}, D {tokens:.3g}: {problem}", int(rows.sum())))
        if best:
            points.append((size, tokens, *best))
    warnings = list(runs.warnings)
    if len(points) < 3:
        found = "; ".join(reason for reason, _ in dropped)
        raise ValueError(
            f"hyperparameters: {len(points)} settings of N and D have a best learning rate inside "
            f"those tried, 3 are needed ({found or 'too few settings'}): try more rates for each"
        )
    size, tokens, best_rate, best_batch = np.array(points).T
    parameters, draws = _line(
        {"lr_coefficient": None, "lr_params_exponent": size, "lr_tokens_exponent": tokens},
        best_rate, bootstrap, seed, warnings,
    )  # fmt: skip
    found = np.isfinite(best_batch)
    if found.sum() >= 2:
        more, again = _line(
            {"batch_coefficient": None, "batch_tokens_exponent": tokens[found]},
            best_batch[found], bootstrap, seed + 1, warnings,
        )  # fmt: skip
        parameters, draws = parameters | more, draws | again
    return Hyperparameters(
        parameters=parameters,
        params=size,
        tokens=tokens,
        learning_rate=best_rate,
        batch_tokens=best_batch,
        draws=draws,
        intervals=spans(draws),
        n_runs=len(runs),
        dropped=(*runs.dropped, *dropped),
        warnings=tuple(warnings),
    )


def _best(
    rate: np.ndarray, batch: np.ndarray, loss: np.ndarray
) -> tuple[tuple[float, float] | None, str]:
    """The best rate and batch size at one (N, D), or None; and what was wrong, or ""."""
    batches = np.unique(batch)  # one NaN if they are not known
    rows = [(batch == b) | (np.isnan(b) & np.isnan(batch)) for b in batches]
    minima = [_minimum(rate[row], loss[row]) for row in rows]
    inside = np.array([np.isfinite(at) for at, _ in minima])
    if not inside.any():
        return None, "the best learning rate is the lowest or the highest tried"
    log_rate, least = np.array([m for m, ok in zip(minima, inside, strict=True) if ok]).T
    lowest = int(np.argmin(least))
    if inside.sum() < 3:
        return (float(np.exp(log_rate[lowest])), np.nan), ""
    at, _ = _minimum(batches[inside], least)
    if not np.isfinite(at):
        # The rate is still the best of its batch size, but of no best batch size.
        return None, "the best batch size is the smallest or the largest tried"
    order = np.argsort(batches[inside])
    best_rate = np.interp(at, np.log(batches[inside])[order], log_rate[order])
    return (float(np.exp(best_rate)), float(np.exp(at))), ""


def _minimum(x: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """log x and loss at the vertex through the lowest point and its neighbours; NaN at an edge."""
    values = np.unique(x)
    least = np.array([loss[x == value].min() for value in values])
    i = int(np.argmin(least))
    if i in (0, len(values) - 1):
        return np.nan, np.nan
    near = slice(i - 1, i + 2)
    middle = np.log(values[i])
    a, b, c = np.polyfit(np.log(values[near]) - middle, least[near], 2)
    return float(middle - b / (2 * a)), float(c - b * b / (4 * a))


def _line(
    terms: dict[str, Any], values: np.ndarray, bootstrap: int, seed: int, warnings: list[str]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """A power law by least squares of logarithms: its parameters, and their replicates.

    The first term is the coefficient. An exponent whose column does not vary, or not apart from
    those before it, is zero, with a warning.
    """
    names: list[str] = []
    columns: list[np.ndarray] = []
    for name, column in terms.items():
        tried = [*columns, np.ones(len(values)) if column is None else np.log(column)]
        if np.linalg.matrix_rank(np.stack(tried, 1), tol=1e-6) == len(tried):
            names, columns = [*names, name], tried
        else:
            warnings.append(f"hyperparameters: these runs do not determine {name}: it is set to 0")
    design = np.stack(columns, 1)
    y = np.log(values)
    solve = np.linalg.pinv(design)
    found = solve @ y
    fitted = design @ found
    residuals = (y - fitted) * np.sqrt(len(y) / max(len(y) - len(names), 1))
    noise = np.random.default_rng(seed).choice(residuals, (len(y), bootstrap))
    again = solve @ (fitted[:, None] + noise)

    def natural(values: np.ndarray) -> dict[str, Any]:
        out = dict(zip(names, values, strict=True))
        out = {name: out.get(name, 0 * values[0]) for name in terms}
        coefficient = next(iter(terms))
        return out | {coefficient: np.exp(out[coefficient])}

    parameters = {name: float(value) for name, value in natural(found).items()}
    return parameters, natural(again) if bootstrap else {}
