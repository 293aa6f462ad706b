"""Scaling laws, each one small differentiable function with its source.

A law maps the columns of a runs table to a loss in nats per token. It is written in jnp, in the
natural parameters of its paper. To add a law, write its function, say where fits should start, and
put the `Law` in `LAWS`: fitting, intervals, certificates and reports then follow.

Starting points are expressed through the centre of the data (geometric means of N and D, median
loss), never in absolute numbers, so that parameters counted in millions start as well as in units.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

Columns = Mapping[str, Any]  # column name -> values of the runs, shape (R,)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One free number of a law: its name, how the solver walks along it, and where it must stop.

    A `log` parameter is positive and is optimised as its logarithm; bounds are in natural units.
    """

    name: str
    log: bool = False
    low: float = 0.0
    high: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Law:
    """A law, its parameters, and the grid of starting points for its fit.

    Attributes:
      name: as on the command line.
      function: `function(columns, **parameters) -> loss`, in nats per token, written in jnp.
      columns: the columns of the runs table that it reads.
      parameters: in the order of the function's keywords.
      starts: `starts(columns, loss) -> {parameter: (S,)}`, natural units.
      equation: for people, in plain text.
      source: paper, section, equation.
    """

    name: str
    function: Callable[..., Any]
    columns: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    starts: Callable[[Columns, np.ndarray], dict[str, np.ndarray]]
    equation: str
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in order."""
        return tuple(parameter.name for parameter in self.parameters)


def power(base: Any, exponent: Any) -> Any:
    """base ** exponent for base > 0: half the time of `**` in float64 on a CPU, same gradients."""
    return jnp.exp(exponent * jnp.log(base))


def grid(**axes: Any) -> dict[str, np.ndarray]:
    """The Cartesian product of some axes, as one column for each: {name: (S,)}."""
    rows = np.array(list(itertools.product(*axes.values())), np.float64)
    return dict(zip(axes, rows.T, strict=True))


def _centre(values: Any) -> float:
    """The geometric mean: the middle of a column that spans decades."""
    return float(np.exp(np.mean(np.log(values))))


def kaplan_power(size: Any, X_c: Any, alpha: Any) -> Any:
    """L(X) = (X_c / X)^alpha: loss as one resource grows and the others do not bind."""
    return power(X_c / size, alpha)


def _kaplan_power_starts(size: Any, loss: np.ndarray) -> dict[str, np.ndarray]:
    # At the centre of the data the law must give about the median loss; alpha sets X_c from it.
    starts = grid(alpha=np.geomspace(0.01, 2.0, 24), level=(0.8, 1.0, 1.25))
    level = starts.pop("level") * np.median(loss)
    return starts | {"X_c": _centre(size) * level ** (1 / starts["alpha"])}


_KAPLAN_POWER = (Parameter(name="X_c", log=True), Parameter(name="alpha", high=5.0))

KAPLAN_N = Law(
    name="kaplan_n",
    function=lambda x, **p: kaplan_power(x["params"], **p),
    columns=("params",),
    parameters=_KAPLAN_POWER,
    starts=lambda x, loss: _kaplan_power_starts(x["params"], loss),
    equation="L(N) = (N_c / N)^alpha",
    source="Kaplan et al. 2020, equation 1.1, arXiv 2001.08361",
)

KAPLAN_D = Law(
    name="kaplan_d",
    function=lambda x, **p: kaplan_power(x["tokens"], **p),
    columns=("tokens",),
    parameters=_KAPLAN_POWER,
    starts=lambda x, loss: _kaplan_power_starts(x["tokens"], loss),
    equation="L(D) = (D_c / D)^alpha",
    source="Kaplan et al. 2020, equation 1.2, arXiv 2001.08361",
)


def kaplan_nd(x: Columns, N_c: Any, D_c: Any, alpha_N: Any, alpha_D: Any) -> Any:
    """L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D."""
    return power(power(N_c / x["params"], alpha_N / alpha_D) + D_c / x["tokens"], alpha_D)


def _kaplan_nd_starts(x: Columns, loss: np.ndarray) -> dict[str, np.ndarray]:
    # `share` is the part of the bracket, at the centre of the data, that is due to N.
    exponents = np.geomspace(0.02, 1.0, 9)
    starts = grid(
        alpha_N=exponents, alpha_D=exponents, share=(0.1, 0.3, 0.5, 0.7, 0.9), level=(0.8, 1, 1.25)
    )
    share, level = starts.pop("share"), starts.pop("level") * np.median(loss)
    alpha_N, alpha_D = starts["alpha_N"], starts["alpha_D"]
    bracket = level ** (1 / alpha_D)
    return starts | {
        "N_c": _centre(x["params"]) * (share * bracket) ** (alpha_D / alpha_N),
        "D_c": _centre(x["tokens"]) * (1 - share) * bracket,
    }


KAPLAN_ND = Law(
    name="kaplan_nd",
    function=kaplan_nd,
    columns=("params", "tokens"),
    parameters=(
        Parameter(name="N_c", log=True),
        Parameter(name="D_c", log=True),
        Parameter(name="alpha_N", low=1e-4, high=5.0),
        Parameter(name="alpha_D", low=1e-4, high=5.0),
    ),
    starts=_kaplan_nd_starts,
    equation="L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D",
    source="Kaplan et al. 2020, equation 1.5, arXiv 2001.08361",
)


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
        "A": starts.pop("model") * above * _centre(x["params"]) ** starts["alpha"],
        "B": starts.pop("data") * above * _centre(x["tokens"]) ** starts["beta"],
        "E": E,
    }


CHINCHILLA = Law(
    name="chinchilla",
    function=chinchilla,
    columns=("params", "tokens"),
    parameters=(
        Parameter(name="A", log=True),
        Parameter(name="B", log=True),
        # No text has an entropy of a ten-thousandth of a nat: a fit that ends there found no floor.
        Parameter(name="E", log=True, low=1e-4),
        Parameter(name="alpha", high=5.0),
        Parameter(name="beta", high=5.0),
    ),
    starts=_chinchilla_starts,
    equation="L(N, D) = E + A / N^alpha + B / D^beta",
    source="Hoffmann et al. 2022, equation 2, arXiv 2203.15556",
)

LAWS: dict[str, Law] = {law.name: law for law in (KAPLAN_N, KAPLAN_D, KAPLAN_ND, CHINCHILLA)}
