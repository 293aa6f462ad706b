"""Laws of one resource, compute, that level off at a floor or change their slope."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from scaling.laws.law import FLOOR, Columns, Law, Parameter, centre, grid, power


def saturating(x: Columns, E: Any, X_c: Any, alpha: Any) -> Any:
    """L(C) = E + (C_c / C)^alpha: a power law down to the loss that no compute removes."""
    return E + power(X_c / x["flops"], alpha)


def _saturating_starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
    starts = grid(alpha=np.geomspace(0.02, 2.0, 16), floor=(0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97))
    E = starts.pop("floor") * np.min(loss)
    above = np.median(loss) - E
    return starts | {"E": E, "X_c": centre(x["flops"]) * above ** (1 / starts["alpha"])}


SATURATING = Law(
    name="saturating",
    function=saturating,
    columns=("flops",),
    parameters=(FLOOR, Parameter(name="X_c", log=True), Parameter(name="alpha", high=5.0)),
    starts=_saturating_starts,
    equation="L(C) = E + (C_c / C)^alpha",
    source="Henighan et al. 2020, equation 1.1, arXiv 2010.14701",
)


def broken_power_law(x: Columns, E: Any, b: Any, c_0: Any, c_1: Any, d_1: Any, f_1: Any) -> Any:
    """L(C) = E + b C^-c_0 (1 + (C / d_1)^(1 / f_1))^(-c_1 f_1): one smooth break, at C = d_1.

    The slope is -c_0 before the break and -(c_0 + c_1) after it; f_1 is the width of the bend.
    """
    compute = x["flops"]
    bend = jnp.logaddexp(0.0, (jnp.log(compute) - jnp.log(d_1)) / f_1)
    return E + b * power(compute, -c_0) * jnp.exp(-c_1 * f_1 * bend)


def _broken_starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
    starts = grid(
        floor=(0.1, 0.5, 0.9),
        c_0=(0.01, 0.05, 0.15, 0.4),
        c_1=(-0.2, -0.03, 0.03, 0.2),
        f_1=(0.1, 0.5, 2.0),
        where=(0.25, 0.5, 0.75),
    )
    E, where = starts.pop("floor") * np.min(loss), starts.pop("where")
    d_1 = np.quantile(x["flops"], where)
    bend = (1 + (centre(x["flops"]) / d_1) ** (1 / starts["f_1"])) ** (
        -starts["c_1"] * starts["f_1"]
    )
    b = (np.median(loss) - E) * centre(x["flops"]) ** starts["c_0"] / bend
    return starts | {"E": E, "b": b, "d_1": d_1}


BROKEN_POWER_LAW = Law(
    name="broken_power_law",
    function=broken_power_law,
    columns=("flops",),
    parameters=(
        FLOOR,
        Parameter(name="b", log=True),
        Parameter(name="c_0", low=-5.0, high=5.0),
        Parameter(name="c_1", low=-5.0, high=5.0),
        Parameter(name="d_1", log=True),
        Parameter(name="f_1", log=True, low=1e-3, high=10.0),
    ),
    starts=_broken_starts,
    equation="L(C) = E + b C^-c_0 (1 + (C / d_1)^(1 / f_1))^(-c_1 f_1)",
    source="Caballero et al. 2022, equation 1, arXiv 2210.14891",
)
