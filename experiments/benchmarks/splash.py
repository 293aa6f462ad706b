"""Splash attention, jax's own kernel for TPU, as the peer of ours."""

import jax
import numpy as np

TILE = 1024
"""Queries, and keys, in a tile: its bundles are fewest with these."""


def splash_attention(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Causal attention of one row [1, T, H, K] to keys and values of fewer heads.

    Its backward pass is the one in two kernels: the fused one takes memory for each tile of keys.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    length, heads, groups = query.shape[1], query.shape[2], keys.shape[2]
    size = min(TILE, length)
    sizes = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=min(512, size),
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * (heads // groups))
    attend = kernels.make_splash_mqa_single_device(mask, block_sizes=sizes)
    grouped = query[0].reshape(length, groups, -1, query.shape[-1]).transpose(1, 2, 0, 3)
    scaled = grouped / np.sqrt(query.shape[-1]).astype(grouped.dtype)
    out = jax.vmap(attend)(scaled, *(x[0].swapaxes(0, 1) for x in (keys, values)))  # G R T E
    return out.transpose(2, 0, 1, 3).reshape(1, length, heads, -1)
