"""Attention by intervals without Pallas: with a table of scores, and with tiles of it in turn."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lineage_jax.kernels.blocks import MASKED, visible
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.typing import Array, Float

TILE = 128
"""Queries that meet their keys at once."""


def reference(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    reads: Intervals,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """softmax(q k / sqrt(K)) v over the keys that each query reads, and its logarithmic sums.

    In float32, or in float64 if it is given that. Query head h reads key-value head h // (H / G).
    Where nothing is read, the result is 0 and the sum MASKED.
    """
    batch, length, num_heads, width = query.shape
    precision = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, length, keys.shape[2], -1, width)  # B T G R K
    scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, keys, preferred_element_type=precision)
    seen = visible(reads, keys.shape[1])[:, None, None]  # #B 1 1 T S
    scores = jnp.where(seen, scores / math.sqrt(width), MASKED)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - largest), 0)
    total = weights.sum(-1, keepdims=True)  # B G R T 1
    some = total > 0
    total = jnp.where(some, total, 1)
    out = jnp.einsum("bgrts,bsge->btgre", weights / total, values.astype(precision))
    log_sum = jnp.where(some, largest + jnp.log(total), MASKED)[..., 0]
    log_sum = log_sum.reshape(batch, num_heads, length)
    return out.reshape(batch, length, num_heads, -1).astype(values.dtype), log_sum


def in_tiles(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    reads: Intervals,
    window: int | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """The same as `reference`, some queries at a time; the backward pass computes scores again.

    Args:
      query, keys, values, reads: of `reference`.
      window: how many keys a query reads at most, if it is known: then a tile of queries that are
        one after another, each at most a key after the one before, meets few keys beside its own.
    """
    (batch, length), num_keys = query.shape[:2], keys.shape[1]
    size = min(TILE, length)
    most = num_keys if window is None else min(num_keys, window + size)

    def tile(query: Any, reads: Intervals) -> Any:
        near, here = [keys, values], reads
        if most < num_keys:
            begin = jnp.where(reads.first > reads.last, num_keys, reads.first).min(1)
            begin = jnp.broadcast_to(jnp.minimum(begin, num_keys - most), (batch,))
            near = [jax.vmap(functools.partial(part, most))(x, begin) for x in near]
            here = Intervals(*(x - begin[:, None] for x in reads))
        return reference(query, near[0], near[1], here)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -length % size)) + ((0, 0),) * (x.ndim - 2), mode="edge")
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    tiles = jax.tree.map(cut, (query, reads))
    out, log_sum = jax.lax.map(lambda inputs: jax.checkpoint(tile)(*inputs), tiles)
    out = out.swapaxes(0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]
    log_sum = jnp.moveaxis(log_sum, 0, 2).reshape(*log_sum.shape[1:3], -1)[..., :length]
    return out, log_sum


def part(size: int, x: Array, begin: Array) -> Array:
    """`size` rows of an array, from one on."""
    return jax.lax.dynamic_slice_in_dim(x, begin, size)
