"""What a law is, and the helpers that laws are written with."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
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
      target: the column that it predicts.
      linear: whether residuals are of the target itself, unless a fit is told otherwise, and not of
        its logarithm.
      derive: makes columns that the table does not hold, of those that it does.
      parameters: in the order of the function's keywords.
      starts: `starts(columns, loss) -> {parameter: (S,)}`, natural units.
      equation: for people, in plain text.
      source: paper, section, equation.
      given: parameters that a fit does not find: they must be fixed.
      needs: the columns of the table that `derive` reads.
    """

    name: str
    function: Callable[..., Any]
    columns: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    starts: Callable[[Columns, np.ndarray], dict[str, np.ndarray]]
    equation: str
    source: str
    given: tuple[str, ...] = ()
    target: str = "loss"
    linear: bool = False
    derive: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    needs: tuple[str, ...] = ()

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
