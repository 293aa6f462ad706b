"""Fine-tuning layer by layer: rates that fall with depth, layers that begin to learn one by one.

Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", sections 3.2
and 3.3, arXiv 1801.06146.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lineage_jax.typing import Array, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerwiseConfig:
    """Adam with a rate for each group of layers, and its schedule.

    Defaults are those of Howard and Ruder 2018: of section 3.2, and Adam's of section 4.1.
    """

    learning_rate: float = 0.01
    """Of the last group of layers, at its peak."""
    cut_fraction: float = 0.1
    """Of all steps, at the start, in which rates rise."""
    ratio: float = 32.0
    """How many times the peak is larger than the lowest rate."""
    layer_decay: float = 2.6
    """How many times the rate of a group is larger than that of the one below; 1 for one rate."""
    unfreeze_every: int = 0
    """Steps, an epoch in the paper, until the next group below begins to learn as well; the last
    group learns from the start. 0: all do."""
    b1: float = 0.7
    b2: float = 0.99
    epsilon: float = 1e-8
    """Kingma and Ba 2015, section 2."""
    max_grad_norm: float | None = None

    def __post_init__(self):
        for name in ("learning_rate", "ratio", "layer_decay"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.cut_fraction < 1:
            raise ValueError(f"cut_fraction must be in [0, 1), got {self.cut_fraction}")
        if self.unfreeze_every < 0:
            raise ValueError(f"unfreeze_every must be 0 or more, got {self.unfreeze_every}")


def slanted_triangular(config: LayerwiseConfig, step: int, num_steps: int) -> float:
    """The rate of the last group at step `step` (from 0) of `num_steps` (section 3.2, equation 3).

    It rises in a straight line from the peak / ratio until step cut = cut_fraction num_steps, and
    falls to there again in another. As `cut` is whole, the second is num_steps - cut steps long,
    which in the paper is cut (1 / cut_fraction - 1).
    """
    cut = int(config.cut_fraction * num_steps)
    share = step / cut if step < cut else max(0.0, 1 - (step - cut) / (num_steps - cut))
    return config.learning_rate * (1 + share * (config.ratio - 1)) / config.ratio


class LayerwiseState(NamedTuple):
    """How many updates were made, and Adam's moments."""

    step: Int[Array, ""]
    mean: Any
    square: Any


def layerwise_adam(
    config: LayerwiseConfig, depth: Callable[[Sequence[str]], int]
) -> optax.GradientTransformationExtraArgs:
    """Adam whose learning rate is an argument, for each group of layers a share of it.

    That of a group is learning_rate / layer_decay^depth (section 3.2). Where a group does not learn
    yet, its moments stay zero; their correction for that start counts from its first update.

    Args:
      config: see there.
      depth: of a parameter's group, from the names on the way to it: 0 for the last group of
        layers, 1 for the one below, and so on.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return LayerwiseState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads, state, params=None, *, learning_rate, **extra_args):
        del params, extra_args
        count = state.step + 1

        def one(path, grad, mean, square):
            group = depth([part.key for part in path])
            learnt = count - group * config.unfreeze_every  # updates, with this one
            grad = jnp.where(learnt > 0, grad, 0)
            mean = config.b1 * mean + (1 - config.b1) * grad
            square = config.b2 * square + (1 - config.b2) * jnp.square(grad)
            times = jnp.maximum(learnt, 1).astype(jnp.float32)
            step = mean / (1 - config.b1**times)
            step /= jnp.sqrt(square / (1 - config.b2**times)) + config.epsilon
            rate = learning_rate * config.layer_decay**-group
            return (-rate * step).astype(grad.dtype), mean, square

        found = jax.tree_util.tree_map_with_path(one, grads, state.mean, state.square)
        updates, mean, square = jax.tree.transpose(
            jax.tree.structure(grads), jax.tree.structure((0, 0, 0)), found
        )
        return updates, LayerwiseState(count, mean, square)

    return optax.GradientTransformationExtraArgs(init, update)
