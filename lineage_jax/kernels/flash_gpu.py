"""Flash attention for GPU, forward, by Triton: `interval_attention` of `lineage_jax.kernels.flash`.

A program has a tile of queries of one head and meets the tiles of keys that any of them reads.
Programs that run side by side have the heads of one group and neighbouring tiles, so that what
they read is in the cache; the last tiles, which read most under a causal mask, begin first.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lineage_jax.kernels.blocks import MASKED, Blocks, padded_reads
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.tiles_gpu import (
    LEAST,
    Arithmetic,
    Tiles,
    cut,
    filled,
    keys_met,
    meet,
    positions,
    read,
    seen,
    whole,
    write,
    zeros,
)
from lineage_jax.typing import Array, Float, Int

FORWARD = {2: Tiles(128, 128, 8, 2), 4: Tiles(64, 32, 4, 1)}
"""By the bytes of a number."""


def flash_forward(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    reads: Intervals,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """`interval_attention_with_sums` by the kernel for GPU, without a gradient of its own.

    Args:
      query, keys, values: projected heads.
      reads: the keys that each query reads; none that is not there.
      interpret: computes on any device, slowly, as a GPU would.
    """
    unit, size = Arithmetic(interpret), query.dtype.itemsize
    width, both = whole(query.shape[-1]), whole(query.shape[-1]) + whole(values.shape[-1])
    tiles = FORWARD[size]
    tiles = tiles.fitted(width * size, tiles.stages * both * size)
    b = cut(query, keys, values, tiles)
    scale = math.log2(math.e) / math.sqrt(query.shape[-1])  # for powers of two: one instruction

    def flash_attention_forward(met_ref, reads_ref, query_ref, keys_ref, values_ref, *outs):
        out_ref, log_ref = outs
        heads, ends = read(query_ref, slice(None)), (reads_ref[0][:, None], reads_ref[1][:, None])

        def tile(masked):
            def add(j, _, state):
                largest, total, attended = state
                at = pl.ds(j * b.columns, b.columns)
                scores = unit.inner_products(heads, read(keys_ref, at))  # rows columns
                if masked:
                    here = seen(ends, positions(j * b.columns, b.columns)[None])
                    scores = jnp.where(here, scores, MASKED)
                new = jnp.maximum(largest, scores.max(1) * scale)
                weights = unit.powers(scores, scale, new[:, None])
                keep = jnp.exp2(largest - new)
                attended = tuple(x * keep[:, None] for x in attended)
                attended = unit.add_products(attended, weights, read(values_ref, at))
                return new, total * keep + weights.sum(1), attended

            return add

        start = jnp.full(b.rows, LEAST), jnp.zeros(b.rows), zeros(b.rows, b.value_width)
        largest, total, attended = meet(met_ref, start, tile)
        some = total > 0
        total = jnp.where(some, total, 1)
        write(out_ref, tuple(x / total[:, None] for x in attended), slice(None))
        log_ref[...] = jnp.where(some, largest * math.log(2) + jnp.log(total), MASKED)

    query_spec, keys_spec, values_spec, out_spec, sums_spec = specs(b)
    given = padded_reads(b, reads)
    out, log_sum = pl.pallas_call(
        flash_attention_forward,
        grid=(b.share, b.num_rows, b.groups, b.batch),
        in_specs=[*told_specs(b, given), query_spec, keys_spec, values_spec],
        out_specs=[out_spec, sums_spec],
        out_shape=[
            jax.ShapeDtypeStruct((b.batch, b.length, b.heads, b.value_width), values.dtype),
            jax.ShapeDtypeStruct((b.batch, b.heads, b.length), jnp.float32),
        ],
        compiler_params=tiles.params,
        interpret=interpret,
        name="flash_attention_forward",
    )(
        keys_met(b, given).stacked(),
        jnp.stack(given, axis=1),
        filled(query, b.length),
        filled(keys, b.num_keys),
        filled(values, b.num_keys),
    )
    return out[:, : query.shape[1], :, : values.shape[-1]], log_sum[..., : query.shape[1]]


def tile_of(blocks: Blocks, number: Int[Array, ""]) -> Int[Array, ""]:
    """The tile of queries of a program: the last ones come first."""
    return blocks.num_rows - 1 - number


def told_specs(blocks: Blocks, reads: Intervals) -> list[pl.BlockSpec]:
    """What is told of a tile of queries, of every row of the batch or of all at once."""
    b, alone = blocks, reads.first.shape[0] == 1
    return [
        pl.BlockSpec((None, None, 4), lambda r, i, g, n: (0 if alone else n, tile_of(b, i), 0)),
        pl.BlockSpec((None, 2, b.rows), lambda r, i, g, n: (0 if alone else n, 0, tile_of(b, i))),
    ]


def specs(blocks: Blocks) -> list[pl.BlockSpec]:
    """Of one head's tile of queries, all its keys and values, and a tile of what it attends to.

    And of its tile of sums [B, H, T].
    """
    b = blocks

    def queries(width):
        def index(r, i, g, n):
            return n, tile_of(b, i), g * b.share + r, 0

        return pl.BlockSpec((None, b.rows, None, width), index)

    def stored(width):
        return pl.BlockSpec((None, b.num_keys, None, width), lambda r, i, g, n: (n, 0, g, 0))

    sums = pl.BlockSpec(
        (None, None, b.rows), lambda r, i, g, n: (n, g * b.share + r, tile_of(b, i))
    )
    return [queries(b.width), stored(b.width), stored(b.value_width), queries(b.value_width), sums]
