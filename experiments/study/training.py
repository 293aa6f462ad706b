"""Training of the arms of a claim: one compiled program for all seeds and learning rates."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lineage_jax.train.optim import OptimizerConfig, adamw, learning_rate
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import LossFn, make_train_step, many_steps
from lineage_jax.typing import Params, PRNGKeyArray

STEPS_PER_CALL = 50  # of one compiled program; it is called again until all updates are made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and towards what: all that a compiled program depends on.

    Attributes:
      module: the model; recipes of equal modules share a program.
      init: from the module and a key, its first parameters, boxed.
      loss_fn: of the module, called as `loss_fn(module, train=True)`.
      optimizer: its settings, but for the peak of the learning rate.
    """

    module: Any
    init: Callable[[Any, PRNGKeyArray], Params]
    loss_fn: Callable[..., LossFn]
    optimizer: OptimizerConfig


@functools.cache
def programs(recipe: Recipe) -> tuple[Any, Any, Any]:
    """Compiled: parameters from a seed; the state before the first update; some updates of it."""
    tx = adamw(recipe.optimizer)
    loss_fn = recipe.loss_fn(recipe.module, train=True)
    step = make_train_step(loss_fn, tx, max_grad_norm=recipe.optimizer.max_grad_norm)

    def init(seed):
        return nn.meta.unbox(recipe.init(recipe.module, jax.random.key(seed)))

    def start(params, extra, seed):
        params, extra = jax.tree.map(jnp.copy, (params, extra))  # the first state is given away
        return TrainState.create(params, tx, extra=extra).replace(seed=seed)

    return jax.jit(init), jax.jit(start), jax.jit(many_steps(step), donate_argnums=0)


def train(recipe: Recipe, stack: Callable[[int, int], Any], **how: Any) -> Params:
    """The parameters after so many updates, trained as `train_state` does."""
    return train_state(recipe, stack, **how).params


def train_state(
    recipe: Recipe,
    stack: Callable[[int, int], Any],
    *,
    seed: int,
    peak: float,
    updates: int,
    params: Params | None = None,
    extra: Any = None,
) -> TrainState:
    """The state after so many updates.

    Args:
      recipe: what is trained.
      stack: from a step and a count, the batches of that many steps, stacked.
      seed: of the first parameters, and of what is drawn as training goes on.
      peak: of the learning rate.
      updates: how many; the schedule ends with them.
      params: to begin with, in place of the recipe's own.
      extra: what the objective reads besides, such as a teacher.

    Raises:
      ValueError: an update was not finite.
    """
    init, start, steps = programs(recipe)
    optimizer = dataclasses.replace(recipe.optimizer, learning_rate=peak)
    rates = np.array([learning_rate(optimizer, i, updates) for i in range(updates)], np.float32)
    params = init(jnp.int32(seed)) if params is None else params
    state = start(params, extra, jnp.int32(seed))
    for first in range(0, updates, STEPS_PER_CALL):
        some = rates[first : first + STEPS_PER_CALL]
        state, metrics = steps(state, stack(first, len(some)), some)
        if metrics["skipped"][0].sum():
            raise ValueError(f"updates at learning rate {peak:g} were not finite")
    return state


def stack(batches: Callable[[int], Mapping[str, np.ndarray]]) -> Callable[[int, int], Any]:
    """From a first step and a count, the batches of those steps on end."""

    def stacked(first: int, count: int) -> dict[str, np.ndarray]:
        made = [batches(step) for step in range(first, first + count)]
        return {name: np.stack([one[name] for one in made]) for name in made[0]}

    return stacked
