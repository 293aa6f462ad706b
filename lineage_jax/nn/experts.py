"""Experts that live on different devices: tokens travel to them and back.

Lepikhin et al. 2020, GShard, section 3.2 (arXiv 2006.16668): each device sorts its tokens into one
bucket for each expert, all devices exchange buckets (an all-to-all), experts compute, and a second
exchange brings the results home.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lineage_jax.nn.split import split
from lineage_jax.typing import Array, Float, Int


def buckets(
    choice: Int[Array, "N"], num_experts: int, capacity: int
) -> tuple[Int[Array, "E C"], Int[Array, "E C"]]:
    """Sorts tokens into a bucket for each expert, in their order.

    Args:
      choice: the expert of each token.
      num_experts: how many there are.
      capacity: tokens that a bucket holds; later ones are dropped (section 2.2).

    Returns:
      The token in each place, and whether there is one (1 or 0).
    """
    num_tokens = choice.shape[0]
    chosen = choice[None] == jnp.arange(num_experts)[:, None]  # E N
    place = jnp.where(chosen, jnp.cumsum(chosen, 1) - 1, capacity)
    tokens = jnp.full((num_experts, capacity), num_tokens, jnp.int32)
    rows = jnp.arange(num_experts)[:, None]
    tokens = tokens.at[rows, place].set(jnp.arange(num_tokens)[None], mode="drop")
    filled = tokens < num_tokens
    return jnp.where(filled, tokens, 0), filled.astype(jnp.int32)


def at_experts(
    compute: Callable[[Any, Float[Array, "E C D"]], Float[Array, "E C D"]],
    weights: Any,
    x: Float[Array, "B T D"],
    choice: Int[Array, "B T"],
    *,
    num_experts: int,
    capacity: int,
) -> Float[Array, "B T D"]:
    """What its expert makes of each token; zeros for tokens that a full bucket drops.

    Where the mesh splits the experts ("experts" in the rules), each device holds its experts'
    weights alone, and its own share of the batch.

    Args:
      compute: from some experts' weights and tokens, [E, C, D], what they make of them.
      weights: a pytree of arrays with a leading axis of experts.
      x: the tokens.
      choice: the expert of each.
      num_experts: how many there are; a multiple of the devices that share them.
      capacity: tokens to an expert from each device's share of the batch.
    """
    axis = split("experts")
    if axis is None:
        return _here(compute, weights, x, choice, num_experts, capacity, None)

    def local(weights, x, choice):
        return _here(compute, weights, x, choice, num_experts, capacity, axis[0])

    split_first = P(axis[0])
    mapped = jax.shard_map(
        local,
        in_specs=(split_first, split_first, split_first),
        out_specs=split_first,
        axis_names={axis[0]},
    )
    return mapped(weights, x, choice)


def _here(compute, weights, x, choice, num_experts, capacity, axis):
    """One device's tokens to the experts and back."""
    tokens, filled = buckets(choice.reshape(-1), num_experts, capacity)
    flat = x.reshape(-1, x.shape[-1])
    packed = flat[tokens] * filled[..., None].astype(x.dtype)  # E C D
    if axis is not None:  # all devices' tokens for our experts
        packed = jax.lax.all_to_all(packed, axis, 0, 1, tiled=True)
    packed = compute(weights, packed)
    if axis is not None:
        packed = jax.lax.all_to_all(packed, axis, 1, 0, tiled=True)
    packed = packed * filled[..., None].astype(packed.dtype)
    out = (
        jnp.zeros_like(flat, packed.dtype)
        .at[tokens.reshape(-1)]
        .add(packed.reshape(-1, packed.shape[-1]))
    )
    return out.reshape(x.shape)
