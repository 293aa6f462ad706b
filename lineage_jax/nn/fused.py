"""Attention by one kernel, on each device of a mesh for its own rows and heads."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lineage_jax.kernels.flash import flash_attention, flash_attention_backward
from lineage_jax.nn.masks import Mask
from lineage_jax.nn.split import mesh_axes, platform, undivided
from lineage_jax.typing import Array, Float

ATTENDED = "attended"
"""What a policy of `jax.checkpoint` calls the results of attention that its gradient needs."""


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
    def local(query, keys, values, segments, window):
        return flash_attention(query, keys, values, **options(mask, segments, window))

    arrays = (query, keys, values)
    out, log_sum = on_each_device(local, arrays, mask, ("bthk", "bht"))
    # Saved one without the other, the kernel would be run again for the other.
    out, log_sum = checkpoint_name(out, ATTENDED), checkpoint_name(log_sum, ATTENDED)
    return out, (query, keys, values, mask, out, log_sum)


def _backward(saved, out_grad):
    query, keys, values, mask, out, log_sum = saved

    def local(query, keys, values, out, out_grad, log_sum, segments, window):
        arrays = (query, keys, values, out, log_sum, out_grad)
        return flash_attention_backward(*arrays, **options(mask, segments, window))

    arrays = (query, keys, values, out, out_grad, log_sum)
    return (*on_each_device(local, arrays, mask, ("bthk",) * 3), None)


fused_attention.defvjp(_forward, _backward)


def options(mask: Mask, segments: Any, window: Any) -> dict[str, Any]:
    """How the kernel takes a mask."""
    return dict(
        causal=mask.causal,
        window=window,
        segment_ids=segments,
        interpret=platform() != "tpu",
    )


def on_each_device(local: Any, arrays: Any, mask: Mask, results: tuple[str, ...]) -> Any:
    """`local(*arrays, segments, window)` on every device, its rows and its heads."""
    of = {"b": tuple(mesh_axes("batch")), "h": tuple(mesh_axes("heads"))}

    def spec(axes: str) -> P:
        return P(*(of.get(axis) for axis in axes))

    segments = mask.query_segments
    if segments is not None:
        segments = jnp.broadcast_to(segments, arrays[0].shape[:2])
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    if not axes:
        return local(*arrays, segments, mask.window)
    mapped = jax.shard_map(
        local,
        in_specs=(*(spec({4: "bthk", 3: "bht"}[x.ndim]) for x in arrays), spec("bt"), P()),
        out_specs=tuple(map(spec, results)),
        axis_names=axes,  # all: the compiler splits no kernel by itself
        check_vma=False,
    )
    return undivided(mapped)(*arrays, segments, mask.window)
