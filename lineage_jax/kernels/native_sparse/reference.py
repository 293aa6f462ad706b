"""Native Sparse Attention as its paper writes it: every score in a table, nothing cut into tiles.

Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse
Attention", section 3.3 (arXiv 2502.11089). This is the truth that other implementations are held
to, and the file to read first. It computes in float32, or in float64 if it is given that.
"""

import math

import jax
import jax.numpy as jnp

from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.config import NSAConfig
from lineage_jax.typing import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row with no visible key has weights that are not NaN


def compressed_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B C G K"],
    values: Float[Array, "B C G E"],
    length: int,
    config: NSAConfig,
    reach: Intervals,
) -> tuple[Float[Array, "B T H E"], Int[Array, "B T G N"]]:
    """Attention to compressed keys (section 3.3.1), and the blocks that its weights select.

    A compressed key is read once its last position is not after the query (equation 7 stops at the
    last whole block), if all of them are in the query's document. The choice has no gradient.

    Args:
      query, keys, values: projected heads.
      length: how many positions there are to select from.
      config: sizes.
      reach: what each query may read at all.
    """
    begin = config.stride * jnp.arange(keys.shape[1])[None, None]
    end = begin + config.compressed_size - 1
    visible = (begin >= reach.first[..., None]) & (end <= reach.last[..., None])  # B T C
    out, weights = attention(query, keys, values, visible[:, :, None])
    scores = importance(jax.lax.stop_gradient(weights), length, config)
    return out, select(scores, config, reach)


def importance(
    weights: Float[Array, "B T G R C"], length: int, config: NSAConfig
) -> Float[Array, "B T G J"]:
    """What each block of positions is worth to the query heads of a group (equations 9 and 10).

    A compressed key gives its weight to a block once for every stride of positions that they share.
    (Equation 9 counts from 1 the compressed keys, and blocks from 0.)
    """
    begin = config.stride * jnp.arange(weights.shape[-1])[:, None]
    block = config.block_size * jnp.arange(config.num_selectable(length))[None]
    shared = jnp.minimum(begin + config.compressed_size, block + config.block_size)
    shared = jnp.maximum(shared - jnp.maximum(begin, block), 0) // config.stride  # C J
    return jnp.einsum("btgrc,cj->btgj", weights, shared.astype(weights.dtype))


def select(
    scores: Float[Array, "B T G J"], config: NSAConfig, reach: Intervals
) -> Int[Array, "B T G N"]:
    """The blocks that each query reads (equation 11), in order; -1 where there are no more.

    The first of its document and the last up to its own are always among them (section 4.1), then
    those that score most. The query heads of a group share them.
    """
    first, own = (x[..., None, None] // config.block_size for x in reach)  # B T 1 1
    blocks = jnp.arange(scores.shape[-1])[None, None, None]
    always = (blocks < first + config.num_first) | (blocks > own - config.num_local)
    readable = (first <= blocks) & (blocks <= own)
    scores = jnp.where(always, jnp.inf, scores)
    scores = jnp.where(readable, scores, -jnp.inf)
    best, chosen = jax.lax.top_k(scores, min(config.num_blocks, blocks.size))
    chosen = jnp.sort(jnp.where(best > -jnp.inf, chosen, blocks.size))
    chosen = jnp.where(chosen < blocks.size, chosen, -1)
    missing = config.num_blocks - chosen.shape[-1]
    return jnp.pad(chosen, ((0, 0),) * 3 + ((0, missing),), constant_values=-1)


def selected_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    blocks: Int[Array, "B T G N"],
    config: NSAConfig,
    reach: Intervals,
) -> Float[Array, "B T H E"]:
    """Attention to the positions of the selected blocks (section 3.3.2, equation 12)."""
    at = jnp.arange(keys.shape[1])[None, None]
    within = (at >= reach.first[..., None]) & (at <= reach.last[..., None])  # B T S
    chosen = (blocks[..., None] == (at // config.block_size)[:, :, None, None]).any(-2)  # B T G S
    return attention(query, keys, values, chosen & within[:, :, None])[0]


def window_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    window: int,
    reach: Intervals,
) -> Float[Array, "B T H E"]:
    """Attention to the last positions (section 3.3.3)."""
    at = jnp.arange(keys.shape[1])[None, None]
    first, last = (x[..., None] for x in reach)
    visible = (at >= first) & (at <= last) & (at > last - window)  # B T S
    return attention(query, keys, values, visible[:, :, None])[0]


def attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    visible: Bool[Array, "B T #G S"],
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T G R S"]]:
    """softmax(q k / sqrt(K)) v over the keys that are visible, and the weights.

    Query head h reads key-value head h // (H / G). Where nothing is visible, all weights are 0.
    """
    batch, length, num_heads, width = query.shape
    precision = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, length, keys.shape[2], -1, width)  # B T G R K
    scores = jnp.einsum("btgrk,bsgk->btgrs", grouped, keys, preferred_element_type=precision)
    visible = visible[:, :, :, None]
    scores = jnp.where(visible, scores / math.sqrt(width), MASKED)
    weights = jnp.where(visible, jax.nn.softmax(scores), 0)
    out = jnp.einsum("btgrs,bsge->btgre", weights, values.astype(precision))
    return out.reshape(batch, length, num_heads, -1).astype(query.dtype), weights
