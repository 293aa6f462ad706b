"""What a law is, and the helpers that laws are written with."""

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


# No text has an entropy of a ten-thousandth of a nat: a fit that ends there found no floor.
FLOOR = Parameter(name="E", log=True, low=1e-4)


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
      given: parameters that a fit does not find: they must be fixed.
    """

    name: str
    function: Callable[..., Any]
    columns: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    starts: Callable[[Columns, np.ndarray], dict[str, np.ndarray]]
    equation: str
    source: str
    given: tuple[str, ...] = ()

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


def centre(values: Any) -> float:
    """The geometric mean: the middle of a column that spans decades."""
    return float(np.exp(np.mean(np.log(values))))
