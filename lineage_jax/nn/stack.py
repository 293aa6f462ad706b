"""Depth: one block, repeated."""

from typing import Literal

import jax
from flax import linen as nn

Remat = Literal["none", "dots", "full"]
"""What the backward pass recomputes: nothing, all but matrix products, or all of a block."""

POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack(
    block: type[nn.Module], num_layers: int, *, remat: Remat = "none", unroll: int = 1
) -> type[nn.Module]:
    """A module of `num_layers` blocks in turn, as one `lax.scan`, compiled once for any depth.

    Args:
      block: a module whose call takes `(x, shared, per_layer)` and returns `(x, output)`, where
        `shared` is a pytree that every block receives whole and `per_layer` one slice of a pytree
        of arrays with a leading axis of `num_layers`.
      num_layers: the depth.
      remat: what the backward pass recomputes to save memory.
      unroll: how many layers one iteration of the scan holds; `num_layers` makes a plain loop.

    Returns:
      A module with the fields of `block`, whose parameters have a leading axis named "layers" and
      whose output is the blocks' outputs, stacked.
    """
    if remat != "none":
        # Inside a scan the compiler cannot merge the recomputation with the forward pass.
        block = nn.remat(block, policy=POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=num_layers,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
