"""The metrics of an objective on what is held out."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params


def heldout_means(
    module: Any,
    loss_fn: Callable[..., LossFn],
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, float]:
    """The mean of each metric over all batches, each by its count.

    Args:
      module: the model.
      loss_fn: its objective, called as `loss_fn(module, train=False)`.
      params: of the model.
      batches: in turn (`one_pass`).
    """
    evaluate = program(module, loss_fn)
    found = [jax.device_get(evaluate(params, batch)) for batch in batches]
    sums = {name: np.sum([one[name] for one in found], axis=0, dtype=float) for name in found[0]}
    return {name: float(total / max(count, 1.0)) for name, (total, count) in sums.items()}


def one_pass(batches: Any) -> Iterator[Mapping[str, np.ndarray]]:
    """Every batch once, of batches that know their number."""
    return map(batches, range(batches.num_batches))


@functools.cache
def program(module: Any, loss_fn: Callable[..., LossFn]) -> Any:
    """Compiled: from parameters and a batch, the metrics as sums and counts."""
    loss = loss_fn(module, train=False)
    return jax.jit(lambda params, batch: loss(params, {}, batch, jax.random.key(0))[1][1])
