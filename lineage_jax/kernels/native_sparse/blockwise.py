"""Native Sparse Attention without Pallas: the reference on one tile of queries after another.

No table has queries and keys both: a tile meets all compressed keys, a few selected blocks and the
window behind it, and the backward pass computes its weights again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lineage_jax.kernels import flash_plain
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse import reference
from lineage_jax.kernels.native_sparse.config import NSAConfig
from lineage_jax.typing import Array, Float, Int

COMPRESSED_TILE = 64
"""Queries that meet all compressed keys at once."""
SELECTED_TILE = 16
"""Queries whose selected keys are gathered at once: these are num_blocks * block_size times as
many."""


def compressed_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B C G K"],
    values: Float[Array, "B C G E"],
    length: int,
    config: NSAConfig,
    reach: Intervals,
) -> tuple[Float[Array, "B T H E"], Int[Array, "B T G N"]]:
    """As `reference.compressed_attention`."""

    def tile(query, reach):
        return reference.compressed_attention(query, keys, values, length, config, reach)

    return over_tiles(jax.checkpoint(tile), COMPRESSED_TILE, query, reach)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def selected_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    blocks: Int[Array, "B T G N"],
    config: NSAConfig,
    reach: Intervals,
) -> Float[Array, "B T H E"]:
    """As `reference.selected_attention`."""
    stored = [in_blocks(x, config.block_size) for x in (keys, values)]

    def tile(query, blocks, reach):
        chosen = (x[places(blocks)] for x in stored)
        return attended(query, *chosen, blocks, config, reach)

    return over_tiles(tile, SELECTED_TILE, query, blocks, reach)


def _selected_forward(query, keys, values, blocks, config, reach):
    out = selected_attention(query, keys, values, blocks, config, reach)
    return out, (query, keys, values, blocks, reach)


def _selected_backward(config, saved, out_grad):
    """Each tile adds what it finds to the gradients of its blocks, in place and in float32."""
    query, keys, values, blocks, reach = saved
    stored = [in_blocks(x, config.block_size) for x in (keys, values)]

    def tile(grads, inputs):
        query, blocks, reach, out_grad = inputs
        chosen = (x[places(blocks)] for x in stored)
        attend = functools.partial(attended, blocks=blocks, config=config, reach=reach)
        of_query, *of_chosen = jax.vjp(attend, query, *chosen)[1](out_grad)
        at = places(blocks)
        pairs = zip(grads, of_chosen, strict=True)
        return [grad.at[at].add(x.astype(grad.dtype)) for grad, x in pairs], of_query

    grads = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in stored]
    tiles = in_tiles(SELECTED_TILE, (query, blocks, reach, out_grad))
    grads, of_query = jax.lax.scan(tile, grads, tiles)
    of_keys, of_values = (
        from_blocks(grad, x.shape[1]).astype(x.dtype)
        for grad, x in zip(grads, (keys, values), strict=True)
    )
    return from_tiles(of_query, query.shape[1]), of_keys, of_values, None, None


selected_attention.defvjp(_selected_forward, _selected_backward)


def attended(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B T G N P K"],
    values: Float[Array, "B T G N P E"],
    blocks: Int[Array, "B T G N"],
    config: NSAConfig,
    reach: Intervals,
) -> Float[Array, "B T H E"]:
    """Attention of each query to the P positions of each of its own N blocks."""
    within = jnp.arange(config.block_size)[None, None, None, None]
    at = config.block_size * blocks[..., None] + within  # B T G N P
    first, last = (x[..., None, None, None] for x in reach)
    visible = (at >= first) & (at <= last) & (blocks >= 0)[..., None]

    def one(query, keys, values, visible):  # B H K, B G N P K, B G N P E, B G N P
        flat = (x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in (keys, values, visible))
        keys, values, visible = (x.swapaxes(1, 2) for x in flat)  # B NP G K ...
        visible = visible.swapaxes(1, 2)[:, None]  # B 1 G NP
        return reference.attention(query[:, None], keys, values, visible)[0][:, 0]

    return jax.vmap(one, in_axes=1, out_axes=1)(query, keys, values, visible)


def window_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    window: int,
    reach: Intervals,
) -> Float[Array, "B T H E"]:
    """As `reference.window_attention`, of queries at positions one after another."""
    reads = Intervals(jnp.maximum(reach.first, reach.last - window + 1), reach.last)
    return flash_plain.in_tiles(query, keys, values, reads, window)[0]


def places(blocks: Int[Array, "B T G N"]) -> tuple[Array, Array, Array]:
    """The indices of blocks in an array [B, G, J, ...]; of -1, those of the last block."""
    rows = jnp.arange(blocks.shape[0])[:, None, None, None]
    return rows, jnp.arange(blocks.shape[2])[:, None], blocks


def in_blocks(x: Float[Array, "B S G K"], size: int) -> Float[Array, "B G J P K"]:
    """Heads cut into blocks of positions, the last one filled up with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).transpose(0, 3, 1, 2, 4)


def from_blocks(blocks: Float[Array, "B G J P K"], length: int) -> Float[Array, "B S G K"]:
    """The heads that were cut into blocks."""
    x = blocks.transpose(0, 2, 3, 1, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def in_tiles(most: int, arrays: Any) -> Any:
    """Arrays [B, T, ...] as [tiles, B, size, ...], of at most that size, the last one padded."""

    def cut(x):
        size = min(most, x.shape[1])
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def from_tiles(tiles: Any, length: int) -> Any:
    """The arrays that were cut into tiles."""

    def join(x):
        x = x.swapaxes(0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, tiles)


def over_tiles(function: Callable[..., Any], size: int, *arrays: Any) -> Any:
    """`function(*arrays)`, of arrays [B, T, ...] to such arrays, some queries at a time."""
    tiles = in_tiles(size, arrays)
    return from_tiles(jax.lax.map(lambda inputs: function(*inputs), tiles), arrays[0].shape[1])
