"""Optimisers and learning-rate schedules.

A schedule is a function of the step that the host evaluates; the optimiser receives its value.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule. Defaults are GPT-3's (Brown et al. 2020, appendix B)."""

    learning_rate: float = 6e-4
    """At its peak; GPT-3's smallest model (table 2.1)."""
    schedule: Literal["cosine", "linear", "wsd", "rsqrt", "constant"] = "cosine"
    """After the warm-up: cosine decay; linear decay to zero (Devlin et al. 2018, appendix A.2);
    stable, and then a linear decay (Hu et al. 2024); or as one over the square root of the step
    (Vaswani et al. 2017, equation 3)."""
    warmup_steps: int = 2000
    """First steps, with a learning rate that rises linearly (GPT-1, section 4.1)."""
    decay_fraction: float = 0.2
    """Of all steps, at the end, that "wsd" decays over (Haegele et al. 2024, section 3)."""
    final_fraction: float = 0.1
    """Of the peak, where "cosine" ends; "wsd" ends at zero."""
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled (Loshchilov and Hutter 2019); on matrices, not on norms and biases."""
    max_grad_norm: float | None = 1.0

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of step `step` (from 0) in a run of `num_steps` steps.

    Under "wsd" two runs of different lengths agree until the shorter one begins to decay, so that
    one run, with a short cool-down from each of its checkpoints, gives several budgets.
    """
    warmup, peak = config.warmup_steps, config.learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, num_steps - warmup)
        low = config.final_fraction
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if config.schedule == "linear":
        return peak * max(0.0, num_steps - step) / max(1, num_steps - warmup)
    if config.schedule == "wsd":
        decay = num_steps - decay_start(config, num_steps)
        return peak * min(1.0, max(0, num_steps - step) / max(1, decay))
    if config.schedule == "rsqrt":
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    return peak


def noam_peak(embed_dim: int, warmup_steps: int) -> float:
    """The learning rate at the end of the warm-up (Vaswani et al. 2017, equation 3)."""
    return (embed_dim * warmup_steps) ** -0.5


def decay_start(config: OptimizerConfig, num_steps: int) -> int:
    """The first step of the final decay of a "wsd" run."""
    return num_steps - round(config.decay_fraction * num_steps)


def decays_weight(params: Any) -> Any:
    """True for each parameter that weight decay acts on: all but scales and biases."""

    def decays(path, _):
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        return names[-1] not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(decays, params)


def scale_by_given_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the `learning_rate` that `update` is given."""

    def update(updates, state, params=None, *, learning_rate, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: -jnp.asarray(learning_rate, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def adamw(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) whose learning rate is an argument."""
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decays_weight),
        scale_by_given_learning_rate(),
    )
