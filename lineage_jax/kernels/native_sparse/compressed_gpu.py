"""The compressed branch on a GPU, and the choice of blocks, which is made of its weights.

Flash attention gives what is attended to, and the sum under each softmax. With that, the weights of
one tile of queries and keys are computed again for one head of the group after another, and what
they add up to is in registers: so no table has all heads. A second kernel finds the best blocks of
each query, all of which it holds at once.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lineage_jax.kernels.blocks import Blocks, padded_reads
from lineage_jax.kernels.flash import clipped
from lineage_jax.kernels.flash_gpu import flash_forward
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.blockwise import over_tiles
from lineage_jax.kernels.native_sparse.config import NSAConfig, compressed_reads
from lineage_jax.kernels.tiles_gpu import (
    SIDE,
    Arithmetic,
    Tiles,
    cut,
    filled,
    keys_met,
    power_of_two,
    read,
    seen,
    whole,
)
from lineage_jax.typing import Array, Float, Int

WORTH = {2: Tiles(128, 128, 8, 2), 4: Tiles(32, 32, 8, 1)}
"""By the bytes of a number."""
CHOICE = Tiles(16, 8192, 4, 1)
"""Queries, and numbers of all their blocks, at most."""
TABLE_BYTES = 2**28
"""What blocks are worth to as many queries at a time as that has room for."""
NOWHERE = 2**30
"""A block after all others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    """How compressed keys make up blocks.

    Attributes:
      count: compressed keys that begin in a block.
      stored: room for them, a power of two.
      overlap: strides of positions that a compressed key stands for.
      chunk: blocks whose keys make up a tile.
      valid, blocks: blocks of positions, and room for them, a power of two.
    """

    count: int
    stored: int
    overlap: int
    chunk: int
    valid: int
    blocks: int


def phases(length: int, config: NSAConfig, columns: int) -> Phases:
    """Of so many positions, with so many keys in a tile at most."""
    count = config.block_size // config.stride
    stored, valid = power_of_two(count), config.num_selectable(length)
    most = min(columns, power_of_two(valid) * stored)
    chunk = max(SIDE, most, stored) // stored
    return Phases(
        count=count,
        stored=stored,
        overlap=config.compressed_size // config.stride,
        chunk=chunk,
        valid=valid,
        blocks=max(chunk, power_of_two(valid)),
    )


def compressed_forward(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B C G K"],
    values: Float[Array, "B C G E"],
    length: int,
    config: NSAConfig,
    reach: Intervals,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"], Int[Array, "B T G N"]]:
    """As `reference.compressed_attention`, with the logarithm of the sum under each softmax.

    It is float32. That of a query that reads nothing is MASKED.
    """
    reads = clipped(compressed_reads(reach, config), keys.shape[1])
    out, log_sum = flash_forward(query, keys, values, reads, interpret=interpret)
    p = phases(length, config, worth_tiles(query).columns)
    stored = in_blocks(keys, p)

    def choose(query, log_sum, reads, reach):
        worth, more = importance(p, query, stored, log_sum, reads, interpret=interpret)
        return best(p, worth, more, config, reach, interpret=interpret)[:, : query.shape[1]]

    batch, queries = query.shape[:2]
    rows = TABLE_BYTES // (2 * 4 * batch * keys.shape[2] * p.blocks)
    rows = max(1, rows // CHOICE_ROWS) * CHOICE_ROWS
    parts = -(-queries // rows)
    size = -(-queries // (parts * CHOICE_ROWS)) * CHOICE_ROWS
    blocks = over_tiles(choose, size, query, log_sum.swapaxes(1, 2), reads, reach)
    return out, log_sum, blocks


CHOICE_ROWS = 128
"""Tables have a multiple of that many queries, so that they are made of whole tiles."""


def worth_tiles(query: Float[Array, "B T H K"]) -> Tiles:
    """Of `importance`: keys stay, and queries are fetched."""
    size = query.dtype.itemsize
    tiles, each = WORTH[size], whole(query.shape[-1]) * size
    return tiles.fitted(tiles.stages * each, each)


def in_blocks(keys: Float[Array, "B C G K"], p: Phases) -> Float[Array, "B keys G E"]:
    """Those of each block side by side, with room for a power of two."""
    batch, count, groups, width = keys.shape
    keys = jnp.pad(keys, ((0, 0), (0, p.valid * p.count - count), (0, 0), (0, 0)))
    keys = keys.reshape(batch, p.valid, p.count, groups, width)
    ends = (0, p.blocks - p.valid), (0, p.stored - p.count), (0, 0), (0, whole(width) - width)
    keys = jnp.pad(keys, ((0, 0), *ends))
    return keys.reshape(batch, p.blocks * p.stored, groups, whole(width))


def importance(
    p: Phases,
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B keys G E"],
    log_sum: Float[Array, "B T H"],
    reads: Intervals,
    *,
    interpret: bool,
) -> tuple[Float[Array, "B G S J"], Float[Array, "B G S J"]]:
    """What each block is worth to the queries of a group (equations 9 and 10), in two parts.

    Of the keys that begin in the block itself; and what these are worth to the next one.
    """
    unit, tiles = Arithmetic(interpret), worth_tiles(query)
    b = cut(query, keys, keys, tiles._replace(columns=p.chunk * p.stored))
    scale, log2_e = math.log2(math.e) / math.sqrt(query.shape[-1]), math.log2(math.e)

    def compressed_importance(met_ref, reads_ref, log_ref, query_ref, keys_ref, *outs):
        tile, near = pl.program_id(0), read(keys_ref, slice(None))
        place = jax.lax.iota(jnp.int32, b.columns)
        phase = jax.lax.rem(place, p.stored)
        key = (tile * p.chunk + jax.lax.div(place, p.stored)) * p.count + phase
        here = seen((reads_ref[0][:, None], reads_ref[1][:, None]), key[None])

        def head(r, total):
            scores = unit.inner_products(read(query_ref, slice(None), r), near)
            return total + unit.powers(scores, scale, log_ref[r][:, None])

        met = (met_ref[0] <= tile) & (tile < met_ref[3])
        total = jnp.zeros((b.rows, b.columns), jnp.float32)
        total = jax.lax.fori_loop(0, met.astype(jnp.int32) * b.share, head, total)
        total = jnp.where(here & (phase < p.count)[None], total, 0)
        next_ = jnp.maximum(phase + p.overlap - p.count, 0)  # strides in the next block
        for ref, strides in zip(outs, (p.overlap - next_, next_), strict=True):
            shared = total * strides.astype(jnp.float32)[None]
            ref[...] = shared.reshape(b.rows, p.chunk, p.stored).sum(2)

    whole_reads = padded_reads(b, reads)
    # Keys are counted without the room that is left between blocks.
    counted = dataclasses.replace(b, columns=p.chunk * p.count, num_keys=p.blocks * p.count)
    ends = ((0, 0), (0, 0), (0, b.length - query.shape[1]))
    table = jax.ShapeDtypeStruct((b.batch, b.groups, b.length, p.blocks), jnp.float32)
    table_spec = pl.BlockSpec((None, None, b.rows, p.chunk), lambda j, i, g, n: (n, g, i, j))
    return pl.pallas_call(
        compressed_importance,
        grid=(b.num_columns, b.num_rows, b.groups, b.batch),
        in_specs=[
            *told_specs(b, whole_reads),
            pl.BlockSpec((None, b.share, b.rows), lambda j, i, g, n: (n, g, i)),
            pl.BlockSpec((None, b.rows, b.share, b.width), lambda j, i, g, n: (n, i, g, 0)),
            pl.BlockSpec((None, b.columns, None, b.width), lambda j, i, g, n: (n, j, g, 0)),
        ],
        out_specs=[table_spec, table_spec],
        out_shape=[table, table],
        compiler_params=tiles.params,
        interpret=interpret,
        name="compressed_importance",
    )(
        keys_met(counted, whole_reads).stacked(),
        jnp.stack(whole_reads, axis=1),
        jnp.pad(log_sum.swapaxes(1, 2) * log2_e, ends),
        filled(query, b.length),
        keys,
    )


def told_specs(b: Blocks, reads: Intervals) -> list[pl.BlockSpec]:
    """What is told of a tile of queries: the tiles of keys it meets, and what each query reads."""
    alone = reads.first.shape[0] == 1
    return [
        pl.BlockSpec((None, None, 4), lambda j, i, g, n: (0 if alone else n, i, 0)),
        pl.BlockSpec((None, 2, b.rows), lambda j, i, g, n: (0 if alone else n, 0, i)),
    ]


def best(
    p: Phases,
    worth: Float[Array, "B G S J"],
    more: Float[Array, "B G S J"],
    config: NSAConfig,
    reach: Intervals,
    *,
    interpret: bool,
) -> Int[Array, "B S G N"]:
    """The blocks that each query reads, as `reference.select` chooses them, in order.

    Args:
      p: how keys make up blocks.
      worth, more: of `importance`.
      config: sizes.
      reach: what each query may read at all.
    """
    batch, groups, length, blocks = worth.shape
    few = min(CHOICE.rows, length, max(1, CHOICE.columns // blocks))
    slots = power_of_two(config.num_blocks)

    def compressed_choice(spans_ref, worth_ref, more_ref, out_ref):
        block = jax.lax.iota(jnp.int32, blocks)
        begin, own = spans_ref[0][:, None], spans_ref[1][:, None]
        row = jax.lax.iota(jnp.int32, few)[:, None]
        before = more_ref[row, jnp.maximum(block - 1, 0)[None]]
        block = block[None]
        value = worth_ref[...] + jnp.where(block > 0, before, 0)
        always = (block < begin + config.num_first) | (block > own - config.num_local)
        readable = (begin <= block) & (block <= own) & (block < p.valid)
        value = jnp.where(always, jnp.inf, value)
        value = jnp.where(readable, value, -jnp.inf)
        slot = jax.lax.iota(jnp.int32, slots)[None]

        def take(n, state):
            value, chosen = state
            most = value.max(1)[:, None]
            at = jnp.where(value == most, block, NOWHERE).min(1)[:, None]
            found = jnp.where(most > -jnp.inf, at, NOWHERE)
            return jnp.where(block == at, -jnp.inf, value), jnp.where(slot == n, found, chosen)

        chosen = jnp.full((few, slots), NOWHERE)
        _, chosen = jax.lax.fori_loop(0, config.num_blocks, take, (value, chosen))
        out_ref[...] = in_order(chosen)

    ends = ((0, 0), (0, length - reach.first.shape[1]))
    spans = jnp.stack([jnp.pad(x // config.block_size, ends) for x in reach], axis=1)
    table = pl.BlockSpec((None, None, few, blocks), lambda i, g, b: (b, g, i, 0))
    found = pl.pallas_call(
        compressed_choice,
        grid=(length // few, groups, batch),
        in_specs=[pl.BlockSpec((None, 2, few), lambda i, g, b: (b, 0, i)), table, table],
        out_specs=pl.BlockSpec((None, few, None, slots), lambda i, g, b: (b, i, g, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, length, groups, slots), jnp.int32),
        compiler_params=CHOICE.params,
        interpret=interpret,
        name="compressed_choice",
    )(spans.astype(jnp.int32), worth, more)
    return found[..., : config.num_blocks]


def in_order(chosen: Int[Array, "T N"]) -> Int[Array, "T N"]:
    """From the lowest block to the highest, and -1 for those that are NOWHERE."""
    slot = jax.lax.iota(jnp.int32, chosen.shape[1])
    other, here = chosen[:, :, None], chosen[:, None, :]
    lower = (other < here) | ((other == here) & (slot[:, None] < slot[None])[None])
    rank = lower.astype(jnp.int32).sum(1)  # of each, among those of its query
    sorted_ = jnp.where(rank[:, :, None] == slot[None, None], chosen[:, :, None], 0).sum(1)
    return jnp.where(sorted_ < NOWHERE, sorted_, -1)
