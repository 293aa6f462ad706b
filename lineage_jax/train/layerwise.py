"""Fine-tuning layer by layer: rates that fall with depth, layers that begin to learn one by one.

Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", sections 3.2
and 3.3, arXiv 1801.06146.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from lineage_jax.train.optim import scale_by_given_learning_rate


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


def layerwise_adam(
    config: LayerwiseConfig, depth: Callable[[Sequence[str]], int], num_groups: int
) -> optax.GradientTransformationExtraArgs:
    """Adam whose learning rate is an argument, for each group of layers a share of it.

    A group that does not learn yet has seen no gradient when it begins to: its moments, and their
    correction for the start, begin there.

    Args:
      config: see there.
      depth: of a parameter, from the names on the way to it: 0 in the last group of layers, 1 in
        the one below, and so on.
      num_groups: of layers.
    """

    def group(number: int) -> optax.GradientTransformationExtraArgs:
        adam = optax.chain(
            optax.scale_by_adam(config.b1, config.b2, config.epsilon),
            optax.scale(config.layer_decay**-number),
            scale_by_given_learning_rate(),
        )
        first = number * config.unfreeze_every
        return optax.conditionally_mask(adam, lambda step: step >= first) if first else adam

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: name(depth(names(path))), params)

    return optax.partition({name(number): group(number) for number in range(num_groups)}, labels)


def name(number: int) -> str:
    """Of a group, as the optimiser's state has it."""
    return f"group_{number}"


def names(path: Sequence[Any]) -> list[str]:
    """Of the modules on the way to a parameter, and its own; boxes add none."""
    return [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
