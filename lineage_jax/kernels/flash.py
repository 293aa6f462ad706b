"""Attention that never holds its table of scores: forward and backward.

Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), algorithms 1 and 4, in the order of Dao 2023,
"FlashAttention-2" (arXiv 2307.08691): softmax is accumulated over blocks of keys, and the backward
pass computes the weights again from their logarithmic sums.
"""

import math

import jax.numpy as jnp

from lineage_jax.kernels.blocks import LANES, Blocks, spans, stored, unstored
from lineage_jax.kernels.flash_tpu import MASKED, backward, forward, inner_products
from lineage_jax.typing import Array, Float, Int


def flash_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B T G K"],
    values: Float[Array, "B T G K"],
    *,
    causal: bool = True,
    window: int | Int[Array, ""] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B H T"]]:
    """softmax(q k / sqrt(K)) v, and the logarithm of the sum under each softmax, float32.

    Args:
      query, keys, values: projected heads; query head h reads key-value head h // (H / G).
      causal: whether a query reads only keys that are not after it.
      window: how many keys a query reads at most, itself included; only if `causal`.
      segment_ids: which document each position belongs to. Documents do not meet; each has its
        positions side by side.
      interpret: computes on any device, slowly, as a TPU would.

    Raises:
      ValueError: for a window without `causal`.
    """
    blocks, arrays = prepared(query, keys, values, causal, window, segment_ids)
    out, log_sum = forward(blocks, *arrays, interpret=interpret)
    length, width = query.shape[1], query.shape[3]
    return unstored(out, width)[:, :length], log_sum[:, :, 0, :length]


def flash_attention_backward(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B T G K"],
    values: Float[Array, "B T G K"],
    out: Float[Array, "B T H K"],
    log_sum: Float[Array, "B H T"],
    out_grad: Float[Array, "B T H K"],
    *,
    causal: bool = True,
    window: int | Int[Array, ""] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
    """The gradients of queries, keys and values, from what `flash_attention` took and returned."""
    blocks, arrays = prepared(query, keys, values, causal, window, segment_ids)
    padding = blocks.length - query.shape[1]
    out, out_grad = padded(out, padding), padded(out_grad, padding)
    inner = inner_products(blocks, out, out_grad, interpret=interpret)
    ends = ((0, 0), (0, 0), (0, padding))
    log_sum = jnp.pad(log_sum, ends, constant_values=-MASKED)  # padding has no weights
    given = (*arrays, out_grad, log_sum[:, :, None], inner)
    grads = backward(blocks, *given, interpret=interpret)
    of_query, of_keys, of_values = (unstored(x, blocks.width)[:, : query.shape[1]] for x in grads)
    return of_query, of_keys, of_values


def prepared(query, keys, values, causal, window, segment_ids):
    """The blocks, and spans, places, queries, keys and values as the kernels take them."""
    if window is not None and not causal:
        raise ValueError("a window needs causal attention")
    batch, valid, heads, width = query.shape
    length = math.ceil(valid / LANES) * LANES
    size = next(n for n in (1024, 512, 256, 128) if length % n == 0)
    blocks = Blocks(batch, heads, keys.shape[2], length, width, size, causal)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, valid), jnp.int32)
    documents = numbered(segment_ids, length)
    places = jnp.arange(length)[None] + 2 * length * documents
    span = jnp.reshape(jnp.asarray(length if window is None else window, jnp.int32), (1,))
    given = spans(documents, size, span), (places[:, :, None], places[:, None, :])
    return blocks, (*given, *(padded(x, length - valid) for x in (query, keys, values)))


def numbered(segment_ids: Int[Array, "B N"], length: int) -> Int[Array, "B T"]:
    """Documents by their order in the row, at more positions: those are a document of their own.

    A place, position + 2 T document, is as far from another document's as no two positions are, so
    one comparison says whether a key is in the same document, not after the query, and within the
    window. Places wrap around at 2^32, past 2^31 / T documents in a row.
    """
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    valid = segment_ids.shape[1]
    begins = jnp.pad(begins, ((0, 0), (0, length - valid)))
    begins = begins.at[:, valid:].set(jnp.arange(valid, length) == valid)
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def padded(heads: Float[Array, "B T H K"], padding: int) -> Float[Array, "..."]:
    """As many positions more at the end, as kernels read them."""
    return stored(jnp.pad(heads, ((0, 0), (0, padding), (0, 0), (0, 0))))
