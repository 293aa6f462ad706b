"""What speaks for a fit being an optimum, and for its parameters being determined by the runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from scaling.laws import Law
from scaling.solver import Problem

AGREE = 1e-6  # relative: objectives this close are the same optimum
ROUNDING = 1e-8  # residuals of log loss below this are zero: far under any seed's noise


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


def warnings(law: Law, certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader must know of it, in plain words."""
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
