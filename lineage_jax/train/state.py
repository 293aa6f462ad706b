"""Everything that a training run carries from one step to the next."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lineage_jax.typing import Params, PRNGKeyArray


@struct.dataclass
class TrainState:
    """A pytree; checkpoints hold exactly this.

    Attributes:
      step: how many steps have been taken, int32.
      seed: of every random number of the run, int32; those of a step follow from (seed, step).
      params: what gradients train.
      extra: what is carried along but not trained by gradients (averages, teachers, statistics).
      opt_state: the optimiser's.
      skipped: how many of the last steps in a row were skipped, their gradients not finite.
    """

    # Any: a pytree also holds shapes, shardings or boxes in the places of its arrays.
    step: Any
    seed: Any
    params: Any
    extra: Any
    opt_state: Any
    skipped: Any

    @classmethod
    def create(
        cls, params: Params, tx: optax.GradientTransformation, *, seed: int = 0, extra: Any = None
    ) -> "TrainState":
        """The state before the first step."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            seed=jnp.asarray(seed, jnp.int32),
            params=params,
            extra={} if extra is None else extra,
            opt_state=tx.init(params),
            skipped=jnp.zeros((), jnp.int32),
        )

    def rng(self) -> PRNGKeyArray:
        """The key of this step's random numbers."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)
