"""Attention by one kernel, on each device of a mesh for its own rows and heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lineage_jax.kernels import flash_backward, flash_forward, intervals, stored, unstored
from lineage_jax.kernels.flash import expectation
from lineage_jax.kernels.platform import platform
from lineage_jax.nn.masks import Mask
from lineage_jax.nn.split import on_each_device, stored_axes
from lineage_jax.typing import Array, Float, Int

ATTENDED = "attended"
"""What a policy of `jax.checkpoint` calls the results of attention that its gradient needs."""

# Logical names of the axes of sums [B, H, T] and of documents [B, T].
SUMS, ROWS = ("batch", "heads", None), ("batch", None)


@jax.custom_vjp
def fused_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B T G K"],
    values: Float[Array, "B T G K"],
    mask: Mask,
) -> Float[Array, "B T H K"]:
    """softmax(q k / sqrt(K)) v, without its table of scores.

    The same as `dot_product_attention` with `mask.dense()`, but for rounding.

    Args:
      query, keys, values: projected heads, of a batch that the mesh divides; query head h reads
        key-value head h // (H / G).
      mask: where queries and keys are positions 0 ... T - 1.
    """
    return _forward(query, keys, values, mask)[0]


def _forward(query, keys, values, mask):
    width, heads = query.shape[-1], stored_axes(query.shape[-1])

    def local(query, keys, values, segments, window):
        arrays = [unstored(x, width) for x in (query, keys, values)]
        out, log_sum = flash_forward(*arrays, **options(mask, arrays[0], segments, window))
        return stored(out), log_sum

    given = (*map(stored, (query, keys, values)), segments_of(mask, query), mask.window)
    out, log_sum = on_each_device(local, given, (*(heads,) * 3, ROWS, ()), (heads, SUMS))
    # Saved one without the other, the kernel would be run again for the other.
    out, log_sum = bits_named(unstored(out, width), ATTENDED), checkpoint_name(log_sum, ATTENDED)
    return out, (query, keys, values, mask, out, log_sum)


def _backward(saved, out_grad):
    query, keys, values, mask, out, log_sum = saved
    width, heads = query.shape[-1], stored_axes(query.shape[-1])

    def local(query, keys, values, out, out_grad, log_sum, segments, window):
        *arrays, grad = (unstored(x, width) for x in (query, keys, values, out, out_grad))
        kind = options(mask, grad, segments, window)
        found = flash_backward(*arrays[:3], out=arrays[3], log_sum=log_sum, out_grad=grad, **kind)
        return tuple(map(stored, found))

    arrays = map(stored, (query, keys, values, out, out_grad))
    given = (*arrays, log_sum, segments_of(mask, query), mask.window)
    grads = on_each_device(local, given, (*(heads,) * 5, SUMS, ROWS, ()), (heads,) * 3)
    return (*(unstored(grad, width) for grad in grads), None)


fused_attention.defvjp(_forward, _backward)


def options(
    mask: Mask, query: Float[Array, "B T H K"], segments: Any, window: Any
) -> dict[str, Any]:
    """How the kernels take a mask."""
    length = query.shape[1]
    return dict(
        reads=intervals(length, length, causal=mask.causal, window=window, segment_ids=segments),
        expected=expectation(mask.causal, mask.window),
        interpret=platform() != "tpu",
    )


def segments_of(mask: Mask, query: Float[Array, "B T H K"]) -> Int[Array, "B T"] | None:
    """The document of each position of each row, if they are told."""
    if mask.query_segments is None:
        return None
    return jnp.broadcast_to(mask.query_segments, query.shape[:2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def heads_named(heads: Float[Array, "B T H K"], name: str) -> Float[Array, "B T H K"]:
    """The same, which a policy of `jax.checkpoint` saves, by that name, as kernels read them."""
    return heads


def bits_named(heads: Float[Array, "B T H K"], name: str) -> Float[Array, "B T H K"]:
    """The same for what has no gradient of its own to pass on: named as integers.

    Of what is saved as floats jax makes a copy that is rounded to their own precision.
    """
    bits = jax.lax.bitcast_convert_type(stored(heads), f"uint{8 * heads.dtype.itemsize}")
    saved = jax.lax.bitcast_convert_type(checkpoint_name(bits, name), heads.dtype)
    return unstored(saved, heads.shape[-1])


heads_named.defvjp(
    lambda heads, name: (bits_named(heads, name), None), lambda name, _, grad: (grad,)
)
