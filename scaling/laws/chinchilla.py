"""Chinchilla's law (Hoffmann et al. 2022) and the laws that descend from it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from scaling.laws.law import FLOOR, Columns, Law, Parameter, centre, grid, power


def chinchilla(x: Columns, A: Any, B: Any, E: Any, alpha: Any, beta: Any) -> Any:
    """L(N, D) = E + A / N^alpha + B / D^beta: entropy of text, finite model, finite data."""
    return E + A * power(x["params"], -alpha) + B * power(x["tokens"], -beta)


def _chinchilla_starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
    # 4500 starts, as many as Hoffmann et al. (appendix D.2) and Besiroglu et al. use.
    starts = grid(
        alpha=(0.1, 0.2, 0.35, 0.5, 0.75, 1.0),
        beta=(0.1, 0.2, 0.35, 0.5, 0.75, 1.0),
        floor=(0.1, 0.4, 0.7, 0.85, 0.95),  # E as a part of the least loss
        model=(0.05, 0.2, 0.4, 0.6, 0.8),  # the terms as parts of what is above E, at the centre
        data=(0.05, 0.2, 0.4, 0.6, 0.8),
    )
    E = starts.pop("floor") * np.min(loss)
    above = np.median(loss) - E
    return starts | {
        "A": starts.pop("model") * above * centre(x["params"]) ** starts["alpha"],
        "B": starts.pop("data") * above * centre(x["tokens"]) ** starts["beta"],
        "E": E,
    }


CHINCHILLA = Law(
    name="chinchilla",
    function=chinchilla,
    columns=("params", "tokens"),
    parameters=(
        Parameter(name="A", log=True),
        Parameter(name="B", log=True),
        FLOOR,
        Parameter(name="alpha", high=5.0),
        Parameter(name="beta", high=5.0),
    ),
    starts=_chinchilla_starts,
    equation="L(N, D) = E + A / N^alpha + B / D^beta",
    source="Hoffmann et al. 2022, equation 2, arXiv 2203.15556",
)


def chinchilla_tied(x: Columns, A: Any, B: Any, E: Any, alpha: Any) -> Any:
    """L(N, D) = E + A / N^alpha + B / D^alpha: model and data improve the loss at one rate."""
    return chinchilla(x, A, B, E, alpha, alpha)


def _tied_starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
    starts = _chinchilla_starts(x, loss)
    tied = starts["alpha"] == starts["beta"]
    return {name: starts[name][tied] for name in ("A", "B", "E", "alpha")}


CHINCHILLA_TIED = Law(
    name="chinchilla_tied",
    function=chinchilla_tied,
    columns=("params", "tokens"),
    parameters=CHINCHILLA.parameters[:4],
    starts=_tied_starts,
    equation="L(N, D) = E + A / N^alpha + B / D^alpha",
    source="Hoffmann et al. 2022, equation 2, beta = alpha as in Gadre et al. 2024, 2403.08540",
)

CHINCHILLA_FIXED_E = dataclasses.replace(CHINCHILLA, name="chinchilla_fixed_e", given=("E",))


def overtraining(x: Columns, a: Any, b: Any, c: Any, E: Any) -> Any:
    """L(N, M) = a N^b + c 6^(b/2) (M N)^b + E, M = D / N tokens per parameter; b is negative.

    Runs of equal M lie on parallel lines: a law fitted to small, Chinchilla-optimal models extends
    to models trained far longer than that.
    """
    scale = power(6.0, b / 2)
    return a * power(x["params"], b) + c * scale * power(x["tokens"], b) + E


def _overtraining_starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
    starts = _tied_starts(x, loss)
    b = -starts["alpha"]
    return {"a": starts["A"], "b": b, "c": starts["B"] * 6 ** (-b / 2), "E": starts["E"]}


OVERTRAINING = Law(
    name="overtraining",
    function=overtraining,
    columns=("params", "tokens"),
    parameters=(
        Parameter(name="a", log=True),
        Parameter(name="b", low=-5.0, high=0.0),
        Parameter(name="c", log=True),
        FLOOR,
    ),
    starts=_overtraining_starts,
    equation="L(N, M) = a N^b + c 6^(b/2) (M N)^b + E, M = D / N",
    source="Gadre et al. 2024, arXiv 2403.08540",
)


def data_constrained(
    x: Columns, A: Any, B: Any, E: Any, alpha: Any, beta: Any, R_N: Any, R_D: Any
) -> Any:
    """Chinchilla's law of an effective model and effective data, where tokens are repeated.

    Of D tokens, U = min(D, unique tokens) are seen for the first time; each further epoch is worth
    less, and R_D epochs in all is what endless repetition is worth:

        D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)),

    and likewise N' of N, with U_N, the model that is compute-optimal for U tokens, and R_N.
    """
    unique = jnp.minimum(x["tokens"], x["unique_tokens"])
    G = power(alpha * A / (beta * B), 1 / (alpha + beta))
    fitting = jnp.minimum(x["params"], G * power(G * unique, beta / alpha))
    return chinchilla(
        {
            "params": _worth(x["params"], fitting, R_N),
            "tokens": _worth(x["tokens"], unique, R_D),
        },
        A, B, E, alpha, beta,
    )  # fmt: skip


def _worth(total: Any, first: Any, R: Any) -> Any:
    """What `total` is worth if all beyond `first` repeats it, each time exp(-1 / R) of the last."""
    return first - first * R * jnp.expm1((1 - total / first) / R)


def _data_constrained_starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
    starts = _chinchilla_starts(x, loss)
    repeats = grid(which=np.arange(0, len(starts["A"]), 7), R_N=(2.0, 8.0), R_D=(4.0, 15.0))
    which = repeats.pop("which").astype(int)
    return {name: column[which] for name, column in starts.items()} | repeats


DATA_CONSTRAINED = Law(
    name="data_constrained",
    function=data_constrained,
    columns=("params", "tokens", "unique_tokens"),
    parameters=(
        *CHINCHILLA.parameters,
        Parameter(name="R_N", log=True, low=1e-2, high=1e4),
        Parameter(name="R_D", log=True, low=1e-2, high=1e4),
    ),
    starts=_data_constrained_starts,
    equation="L = E + A / N'^alpha + B / D'^beta, repeated tokens and excess parameters decaying",
    source="Muennighoff et al. 2023, section 3.1, arXiv 2305.16264",
)
