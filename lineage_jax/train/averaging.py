"""Averaged SGD that begins when progress ends: NT-ASGD.

Merity et al. 2017, "Regularizing and Optimizing LSTM Language Models", section 3 and algorithm 1,
arXiv 1708.02182. Steps are plain SGD throughout. Once an evaluation is worse than the best of all
but the last n before it, the mean of the parameters from there on is what counts (Polyak and
Juditsky 1992); training itself goes on from the parameters as they are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lineage_jax.train.optim import scale_by_given_learning_rate
from lineage_jax.typing import Array, Float, Int, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AveragedSGDConfig:
    """NT-ASGD. Defaults are those of Merity et al. 2017, section 5."""

    learning_rate: float = 30.0
    """The same from the first step to the last."""
    patience: int = 5
    """Evaluations that may fail to improve on those before them: the non-monotone interval, n."""
    max_grad_norm: float | None = 0.25

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")


def sgd() -> optax.GradientTransformationExtraArgs:
    """Plain SGD whose learning rate is an argument (Merity et al., equation 1)."""
    return scale_by_given_learning_rate()


@struct.dataclass
class Average:
    """What NT-ASGD carries along, in the `extra` of a training state.

    Attributes:
      mean: of the parameters since averaging began; zeros until then.
      count: how many it is the mean of; 0 until averaging begins.
      recent: losses of the last n evaluations, the latest last; infinite where there were fewer.
      best: the least loss of all evaluations before those.
      told: the step of the last evaluation, or -1.
    """

    # Any: a pytree also holds shapes, shardings or boxes in the places of its arrays.
    mean: Any
    count: Any
    recent: Any
    best: Any
    told: Any


def begin(params: Params, patience: int) -> Average:
    """Before any evaluation; boxes around parameters stay around their means."""
    return Average(
        mean=jax.tree.map(jnp.zeros_like, params),
        count=jnp.zeros((), jnp.int32),
        recent=jnp.full((patience,), jnp.inf),
        best=jnp.asarray(jnp.inf),
        told=jnp.asarray(-1, jnp.int32),
    )


def after_step(params: Params, average: Average) -> Average:
    """Takes the new parameters into the mean, once averaging has begun."""
    count = average.count + (average.count > 0)
    share = 1.0 / jnp.maximum(count, 1)

    def moved(mean, new):
        return jnp.where(count > 0, mean + (new - mean) * share.astype(mean.dtype), mean)

    return dataclasses.replace(average, mean=jax.tree.map(moved, average.mean, params), count=count)


def after_evaluation(
    params: Params, average: Average, loss: Float[Array, ""], step: Int[Array, ""]
) -> Average:
    """Begins to average if the loss is worse than the best of all but the last n before it.

    To hear of the same step twice, as a run that resumes there does, changes nothing.

    Args:
      params: that were evaluated.
      average: as it was.
      loss: held out, in nats per token.
      step: how many steps have been taken.
    """
    begins = (average.count == 0) & (loss > average.best)  # inf, where there are n or fewer
    heard = dataclasses.replace(
        average,
        mean=jax.tree.map(lambda mean, new: jnp.where(begins, new, mean), average.mean, params),
        count=jnp.where(begins, 1, average.count),
        recent=jnp.append(average.recent[1:], loss),
        best=jnp.minimum(average.best, average.recent[0]),
        told=step,
    )
    again = average.told == step
    return jax.tree.map(lambda old, new: jnp.where(again, old, new), average, heard)


def in_use(params: Params, average: Average) -> Params:
    """The mean if there is one, and the parameters until then."""
    return jax.tree.map(
        lambda mean, own: jnp.where(average.count > 0, mean, own), average.mean, params
    )
