"""One token at a time on a GPU: keys and values are read where they are in the cache.

What a token reads of one branch is cut in pieces, each of which a program attends to, with all
heads of a group; so that even few rows of a batch fill the chip. What the pieces give, and the
choice of blocks between, is small, and left to the compiler.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lineage_jax.kernels.blocks import MASKED
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse import reference
from lineage_jax.kernels.native_sparse.config import Branches, NSAConfig, compressed_reads
from lineage_jax.kernels.tiles_gpu import (
    LEAST,
    SIDE,
    Arithmetic,
    Tiles,
    parts,
    positions,
    power_of_two,
    read,
    seen,
    whole,
    write,
    zeros,
)
from lineage_jax.typing import Array, Float, Int

TILES = Tiles(SIDE, 64, 4, 2)
"""Heads, at least, and keys that meet at once."""
PIECE = 256
"""Keys of a piece at most: with fewer, what pieces give would be much beside what they read."""


class Attended(NamedTuple):
    """What a token's heads found in pieces of its keys.

    Attributes:
      values: sums of values by their weights.
      largest, total: the largest score, to base 2, and the sum of weights.
      scores: of the keys of each piece, to base 2; any where a key is not read.
    """

    values: Float[Array, "B G n R E"]
    largest: Float[Array, "B G n R"]
    total: Float[Array, "B G n R"]
    scores: Float[Array, "B G n R P"]

    def joined(self) -> tuple[Float[Array, "B H E"], Float[Array, "B G R"]]:
        """What is attended to, and the logarithm of each sum, to base 2."""
        largest = self.largest.max(2)  # B G R
        share = jnp.exp2(self.largest - largest[:, :, None])
        total = (self.total * share).sum(2)
        some = total > 0
        total = jnp.where(some, total, 1)
        values = (self.values * share[..., None]).sum(2) / total[..., None]
        values = values.reshape(values.shape[0], -1, values.shape[-1])
        return values, jnp.where(some, largest + jnp.log2(total), -MASKED)


def decode_attention(
    query: Float[Array, "B 1 H K"],
    keys: Branches,
    values: Branches,
    gates: Float[Array, "B 1 H 3"],
    at: Int[Array, "B 1"],
    config: NSAConfig,
    *,
    interpret: bool = False,
) -> Float[Array, "B 1 H E"]:
    """The three branches of one token of each row, each times its gate.

    Args:
      query, gates: of the token.
      keys, values: of each branch, as the cache has them, [B, G, S, K] and [B, G, S, E].
      at: the position of the token.
      config: sizes.
      interpret: computes on any device, slowly, as a GPU would.
    """
    compressed, length = keys.compressed.shape[2], keys.selected.shape[2]

    def attend(keys, values, begin, end, size):
        shape = (*keys.shape[:2], begin.shape[-1])
        ranges = Intervals(*(jnp.broadcast_to(x, shape) for x in (begin, end)))
        return pieces(query[:, 0], keys, values, ranges, size, interpret=interpret)

    size = PIECE
    begin = (jnp.arange(-(-compressed // size)) * size)[None, None]
    last = compressed_reads(Intervals(jnp.zeros_like(at), at), config).last[..., None]
    end = jnp.minimum(begin + size - 1, jnp.minimum(last, compressed - 1))
    squeezed = attend(keys.compressed, values.compressed, begin, end, size)
    first, log_sum = squeezed.joined()
    blocks = chosen_blocks(squeezed.scores, log_sum, last, length, at, config)  # B G N

    size = min(PIECE, config.block_size)
    part = size * jnp.arange(-(-config.block_size // size))
    begin = blocks[..., None] * config.block_size + part[None, None, None]  # B G N parts
    end = jnp.minimum(begin + size - 1, (blocks[..., None] + 1) * config.block_size - 1)
    end = jnp.where(blocks[..., None] < 0, -1, jnp.minimum(end, at[..., None, None]))
    begin, end = (x.reshape(*blocks.shape[:2], -1) for x in (jnp.maximum(begin, 0), end))
    second, _ = attend(keys.selected, values.selected, begin, end, size).joined()

    size = min(PIECE, config.window)
    oldest = (at - config.window + 1)[..., None]  # B 1 1
    begin = oldest + (size * jnp.arange(-(-config.window // size)))[None, None]
    end = jnp.minimum(begin + size - 1, at[..., None])
    begin = jnp.maximum(begin, 0)
    third, _ = attend(keys.window, values.window, begin, end, size).joined()

    outs = jnp.stack([first, second, third], axis=2)  # B H 3 E
    return jnp.einsum("bthi,bhie->bthe", gates.astype(outs.dtype), outs).astype(query.dtype)


def chosen_blocks(
    scores: Float[Array, "B G n R P"],
    log_sum: Float[Array, "B G R"],
    last: Int[Array, "B 1 1"],
    length: int,
    at: Int[Array, "B 1"],
    config: NSAConfig,
) -> Int[Array, "B G N"]:
    """The blocks that a token reads, as `reference.select` chooses them.

    Args:
      scores, log_sum: of compressed keys.
      last: of these, that is read.
      length: how many positions there are to select from.
      at: the token's own.
      config: sizes.
    """
    phases, count = config.block_size // config.stride, config.num_selectable(length)
    overlap = config.compressed_size // config.stride
    weights = jnp.exp2(scores - log_sum[:, :, None, :, None]).sum(3)  # B G n P
    weights = weights.reshape(*weights.shape[:2], -1)
    weights = jnp.where(jnp.arange(weights.shape[-1])[None, None] <= last, weights, 0)
    lacking = count * phases - weights.shape[-1]
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, max(0, lacking))))[..., : count * phases]
    weights = weights.reshape(*weights.shape[:2], count, phases)
    after = jnp.maximum(jnp.arange(phases) + overlap - phases, 0)  # strides in the next block
    own, next_ = (
        (weights * x.astype(weights.dtype)[None, None, None]).sum(-1)
        for x in (overlap - after, after)
    )
    worth = own + jnp.pad(next_, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    reads = Intervals(jnp.zeros_like(at), at)
    return reference.select(worth[:, None], config, reads)[:, 0]


def pieces(
    query: Float[Array, "B H K"],
    keys: Float[Array, "B G S K"],
    values: Float[Array, "B G S E"],
    ranges: Intervals,
    size: int,
    *,
    interpret: bool,
) -> Attended:
    """What heads find in pieces, `ranges` [B, G, n], of keys side by side, `size` at most."""
    unit, columns = Arithmetic(interpret), TILES.columns
    batch, groups, stored, width = keys.shape
    share, count = query.shape[1] // groups, ranges.first.shape[-1]
    rows, room = max(TILES.rows, power_of_two(share)), -(-size // columns) * columns
    scale = math.log2(math.e) / math.sqrt(width)

    def filled(x, length):
        ends = (0, length - x.shape[-2]), (0, whole(x.shape[-1]) - x.shape[-1])
        return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ends)

    heads = filled(query.reshape(batch, groups, share, width), rows)
    given = [filled(x, stored) for x in (keys, values)]
    value_width = given[1].shape[-1]

    def decode_pieces(ranges_ref, query_ref, keys_ref, values_ref, *outs):
        values_out, largest_out, total_out, scores_out = outs
        begin, end, heads = ranges_ref[0], ranges_ref[1], read(query_ref, slice(None))

        def add(i, state):
            largest, total, attended = state
            start = begin + i * columns
            here = seen((begin, end), positions(start, columns))

            def near(ref):
                at = (ref.at[pl.ds(start, columns), part] for part in parts(ref.shape[-1]))
                found = (plgpu.load(x, mask=here[:, None], other=0) for x in at)
                return tuple(x.astype(query.dtype) for x in found)

            scores = unit.inner_products(heads, near(keys_ref))
            scores_out[:, pl.ds(i * columns, columns)] = scores * scale
            scores = jnp.where(here[None], scores, MASKED)
            new = jnp.maximum(largest, scores.max(1) * scale)
            weights = unit.powers(scores, scale, new[:, None])
            keep = jnp.exp2(largest - new)
            attended = tuple(x * keep[:, None] for x in attended)
            attended = unit.add_products(attended, weights, near(values_ref))
            return new, total * keep + weights.sum(1), attended

        start = jnp.full(rows, LEAST), jnp.zeros(rows), zeros(rows, value_width)
        times = jax.lax.div(jnp.maximum(end - begin + columns, 0), columns)
        largest_out[...], total_out[...], found = jax.lax.fori_loop(0, times, add, start)
        write(values_out, found, slice(None))

    def piece(*shape):
        index = (0,) * len(shape)
        return pl.BlockSpec((None, None, None, *shape), lambda n, g, b: (b, g, n, *index))

    def of_group(*shape):
        return pl.BlockSpec((None, None, *shape), lambda n, g, b: (b, g, 0, 0))

    found = pl.pallas_call(
        decode_pieces,
        grid=(count, groups, batch),
        in_specs=[
            piece(2),
            of_group(rows, heads.shape[-1]),
            *(of_group(stored, x.shape[-1]) for x in given),
        ],
        out_specs=[piece(rows, value_width), piece(rows), piece(rows), piece(rows, room)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, groups, count, *shape), jnp.float32)
            for shape in ((rows, value_width), (rows,), (rows,), (rows, room))
        ],
        compiler_params=TILES.params,
        interpret=interpret,
        name="decode_pieces",
    )(jnp.stack(ranges, axis=-1).astype(jnp.int32), heads, *given)
    out, largest, total, scores = (x[:, :, :, :share] for x in found)
    return Attended(out[..., : values.shape[-1]], largest, total, scores[..., :size])
