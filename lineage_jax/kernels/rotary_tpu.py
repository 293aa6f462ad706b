"""The kernel that turns pairs of components on a TPU: heads are read once, and written once."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import LANES, aligned
from lineage_jax.typing import Array, Float

BLOCK_BYTES = 2**20
"""Of heads that are turned at once: with what is read and written meanwhile, and the angles, less
than half of the 16 MiB that a TPU v4 has on the chip."""


def turnable(length: int, width: int) -> bool:
    """Whether heads of that width, at so many positions, are blocks that `turn` takes."""
    return length % LANES == 0 and aligned(width)


def turn(
    heads: Float[Array, "B T HK"],
    cos: Float[Array, "B T K"],
    sin: Float[Array, "B T K"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T HK"]:
    """heads * cos + partners * sin, where components i and i + K / 2 are partners.

    Args:
      heads: side by side (`stored`), of a length and width K that are `turnable`.
      cos, sin: in float32, as the result is computed.
      interpret: computes on any device, slowly, as a TPU would.
    """
    batch, length, _ = heads.shape
    width = cos.shape[-1]
    num_heads = heads.shape[-1] // width
    rows = next(n for n in (512, 256, 128) if length % n == 0)
    most = max(1, BLOCK_BYTES // (rows * width * heads.dtype.itemsize))
    share = max(n for n in range(1, num_heads + 1) if num_heads % n == 0 and n <= most)

    def kernel(heads_ref, cos_ref, sin_ref, out_ref):
        for h in range(share):
            here = pl.ds(h * width, width)
            head = heads_ref[:, here].astype(jnp.float32)
            turned = head * cos_ref[...] + pltpu.roll(head, width // 2, 1) * sin_ref[...]
            out_ref[:, here] = turned.astype(out_ref.dtype)

    block = pl.BlockSpec((None, rows, share * width), lambda n, i, h: (n, i, h))
    angles = pl.BlockSpec((None, rows, width), lambda n, i, h: (n, i, 0))
    return pl.pallas_call(
        kernel,
        grid=(batch, length // rows, num_heads // share),  # angles stay for all heads
        in_specs=[block, angles, angles],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(heads.shape, heads.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(pltpu.PARALLEL,) * 3),
        cost_estimate=pl.CostEstimate(
            flops=3 * heads.size,
            transcendentals=0,
            bytes_accessed=2 * heads.nbytes + cos.nbytes + sin.nbytes,
        ),
        name="turn",
        interpret=interpret,
    )(heads, cos, sin)
