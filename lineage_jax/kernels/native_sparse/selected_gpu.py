"""The selected branch on a GPU: neighbouring queries read the blocks of all of them together.

Were each query to read its blocks alone, even from the cache that would take longer than to compute
with them. So a program has a tile of neighbouring queries, all heads of a group to each: enough
rows to fill a matrix unit. It meets every block once that any of them selected, and hides it from
the others. Neighbours mostly select the same; where they do not, rows of products are wasted, as
they would be if a unit of 64 rows had the few heads of one query. The programs of one key-value
head follow one another, so that its keys and values stay in the cache.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lineage_jax.kernels.blocks import MASKED
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.config import NSAConfig
from lineage_jax.kernels.tiles_gpu import (
    LEAST,
    SIDE,
    Arithmetic,
    Tiles,
    positions,
    power_of_two,
    read,
    seen,
    whole,
    write,
    zeros,
)
from lineage_jax.typing import Array, Float, Int

FORWARD = {2: Tiles(64, 64, 4, 2), 4: Tiles(32, 32, 8, 1)}
"""By the bytes of a number. Rows are heads of queries; columns, keys of a block."""
NEIGHBOURS = 16
"""Queries of a tile at most: of those of a group with few heads more would meet too many blocks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one call.

    Attributes:
      batch, length, groups, share: of queries [B, T, G, R], in whole tiles and powers of two.
      width, value_width: of heads, whole.
      count, size: of blocks of keys.
      each: blocks that a query selects.
      queries: in a tile.
      columns: keys that are met at once, a block or a part of one.
    """

    batch: int
    length: int
    groups: int
    share: int
    width: int
    value_width: int
    count: int
    size: int
    each: int
    queries: int
    columns: int

    @property
    def rows(self) -> int:
        """Heads of queries in a tile."""
        return self.queries * self.share

    @property
    def tiles(self) -> int:
        """Of queries."""
        return self.length // self.queries

    @property
    def parts(self) -> int:
        """Of a block, that are met one after another."""
        return -(-self.size // self.columns)

    @property
    def num_keys(self) -> int:
        """Positions that are stored, so that the last part of the last block is whole."""
        return (self.count - 1) * self.size + self.parts * self.columns


def sizes(
    query: Array, keys: Array, values: Array, each: int, config: NSAConfig, tiles: Tiles
) -> Sizes:
    """Of arrays as `selected_forward` takes them.

    Raises:
      ValueError: for more blocks than have numbers.
    """
    count, most = config.num_selectable(keys.shape[1]), 1 << (31 - NEIGHBOURS)
    if count >= most:
        raise ValueError(f"wanted fewer than {most} blocks of keys, got {count}")
    (batch, length, heads, width), groups = query.shape, keys.shape[2]
    share = power_of_two(heads // groups)
    queries = min(NEIGHBOURS, max(tiles.rows // share, SIDE // share, 1))
    return Sizes(
        batch=batch,
        length=-(-length // queries) * queries,
        groups=groups,
        share=share,
        width=whole(width),
        value_width=whole(values.shape[-1]),
        count=count,
        size=config.block_size,
        each=each,
        queries=queries,
        columns=min(tiles.columns, max(SIDE, power_of_two(config.block_size))),
    )


def as_rows(heads: Float[Array, "B T H K"], s: Sizes) -> Float[Array, "B rows width"]:
    """Heads of queries below one another, in whole tiles and widths and powers of two."""
    batch, length, _, width = heads.shape
    heads = heads.reshape(batch, length, s.groups, -1, width)
    ends = (0, s.length - length), (0, 0), (0, s.share - heads.shape[3]), (0, whole(width) - width)
    return jnp.pad(heads, ((0, 0), *ends)).reshape(batch, -1, whole(width))


def from_rows(
    rows: Float[Array, "B rows width"], shape: tuple[int, ...], s: Sizes
) -> Float[Array, "B T H K"]:
    """The heads of some shape that were rows."""
    batch, length, heads, width = shape
    rows = rows.reshape(batch, s.length, s.groups, s.share, -1)
    rows = rows[:, :length, :, : heads // s.groups, :width]
    return rows.reshape(shape)


def sums_as_rows(sums: Float[Array, "B H T"], fill: float, s: Sizes) -> Float[Array, "B rows"]:
    """Of each head of each query, in the order of `as_rows`."""
    batch, heads, length = sums.shape
    sums = sums.swapaxes(1, 2).reshape(batch, length, s.groups, -1)
    ends = (0, s.length - length), (0, 0), (0, s.share - heads // s.groups)
    return jnp.pad(sums, ((0, 0), *ends), constant_values=fill).reshape(batch, -1)


def sums_from_rows(
    rows: Float[Array, "B rows"], shape: tuple[int, ...], s: Sizes
) -> Float[Array, "B H T"]:
    """The numbers of heads of some shape."""
    batch, length, heads, _ = shape
    rows = rows.reshape(batch, s.length, s.groups, s.share)
    rows = rows[:, :length, :, : heads // s.groups].reshape(batch, length, heads)
    return rows.swapaxes(1, 2)


def stored(heads: Float[Array, "B S G K"], s: Sizes) -> Float[Array, "B keys G E"]:
    """Keys or values in whole parts of blocks, and whole widths."""
    ends = (0, s.num_keys - heads.shape[1]), (0, whole(heads.shape[-1]) - heads.shape[-1])
    return jnp.pad(heads, ((0, 0), ends[0], (0, 0), ends[1]))


def spans(reach: Intervals, s: Sizes) -> Int[Array, "B 2 queries"]:
    """The first and the last key of each query; none of those that are added."""
    ends = ((0, 0), (0, s.length - reach.first.shape[1]))
    both = [jnp.pad(x, ends, constant_values=n) for x, n in zip(reach, (0, -1), strict=True)]
    return jnp.stack(both, axis=1).astype(jnp.int32)


def unions(
    blocks: Int[Array, "B T G N"], s: Sizes
) -> tuple[Int[Array, "B G tiles n"], Int[Array, "B G tiles 1"]]:
    """The blocks that any query of each tile selected, and how many these are.

    A block is its number from bit NEIGHBOURS on, and below that a bit for each query that selected
    it. They are found by sorting blocks twice: to bring the same ones together, and then the first
    of each to the front.
    """
    blocks = jnp.pad(
        blocks,
        ((0, 0), (0, s.length - blocks.shape[1]), (0, 0), (0, 0)),
        constant_values=-1,
    )
    blocks = jnp.where(blocks < 0, s.count, blocks).swapaxes(1, 2)  # B G T N
    blocks = blocks.reshape(s.batch, s.groups, s.tiles, s.queries, -1)
    member = jnp.arange(s.queries, dtype=jnp.int32)[:, None]
    pairs = blocks * s.queries + jnp.broadcast_to(member, blocks.shape)
    pairs = jnp.sort(pairs.reshape(*blocks.shape[:3], -1), stable=False)
    block, bit = pairs // s.queries, 1 << (pairs % s.queries)
    bits = bit
    for n in range(1, s.queries):  # a query has a block once, so these are all that may be the same
        ends = ((0, 0),) * 3 + ((0, n),)
        same = jnp.pad(block[..., n:], ends, constant_values=-1) == block
        bits = bits | jnp.where(same, jnp.pad(bit[..., n:], ends), 0)
    new = jnp.diff(block, axis=-1, prepend=-1) != 0
    new &= block < s.count
    last = jnp.iinfo(jnp.int32).max
    found = jnp.sort(jnp.where(new, (block << NEIGHBOURS) | bits, last), stable=False)
    return found, new.sum(-1, keepdims=True, dtype=jnp.int32)


def selected_forward(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    blocks: Int[Array, "B T G N"],
    config: NSAConfig,
    reach: Intervals,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """As `reference.selected_attention`, and the logarithm of the sum under each softmax, float32.

    That of a query that reads nothing is MASKED.
    """
    unit, bytes_ = Arithmetic(interpret), query.dtype.itemsize
    width, both = whole(query.shape[-1]), whole(query.shape[-1]) + whole(values.shape[-1])
    tiles = FORWARD[bytes_]
    tiles = tiles.fitted(width * bytes_, tiles.stages * both * bytes_)
    s = sizes(query, keys, values, blocks.shape[-1], config, tiles)
    scale = math.log2(math.e) / math.sqrt(query.shape[-1])  # for powers of two: one instruction

    def selected_forward(union_ref, count_ref, spans_ref, query_ref, keys_ref, values_ref, *outs):
        out_ref, log_ref = outs
        rows = own_rows(s)
        heads = read(query_ref, rows)

        def add(at, here, state):
            largest, total, attended = state
            scores = jnp.where(here, unit.inner_products(heads, read(keys_ref, at)), MASKED)
            new = jnp.maximum(largest, scores.max(1) * scale)
            weights = unit.powers(scores, scale, new[:, None])
            keep = jnp.exp2(largest - new)
            attended = tuple(x * keep[:, None] for x in attended)
            attended = unit.add_products(attended, weights, read(values_ref, at))
            return new, total * keep + weights.sum(1), attended

        start = jnp.full(s.rows, LEAST), jnp.zeros(s.rows), zeros(s.rows, s.value_width)
        largest, total, attended = meet(s, union_ref, count_ref, spans_ref, add, start)
        some = total > 0
        total = jnp.where(some, total, 1)
        write(out_ref, tuple(x / total[:, None] for x in attended), rows)
        log_ref[rows] = jnp.where(some, largest * math.log(2) + jnp.log(total), MASKED)

    out_rows = s.batch, s.length * s.groups * s.share
    out, log_sum = pl.pallas_call(
        selected_forward,
        grid=(s.tiles, s.groups, s.batch),
        in_specs=[*told_specs(s), rows_spec(s, s.width), *stored_specs(s)],
        out_specs=[rows_spec(s, s.value_width), rows_spec(s)],
        out_shape=[
            jax.ShapeDtypeStruct((*out_rows, s.value_width), query.dtype),
            jax.ShapeDtypeStruct(out_rows, jnp.float32),
        ],
        compiler_params=tiles.params,
        interpret=interpret,
        name="selected_forward",
    )(*unions(blocks, s), spans(reach, s), as_rows(query, s), stored(keys, s), stored(values, s))
    shape = *query.shape[:3], values.shape[-1]
    return from_rows(out, shape, s), sums_from_rows(log_sum, shape, s)


def own_rows(s: Sizes) -> Any:
    """The rows of a program's queries."""
    row = jax.lax.iota(jnp.int32, s.rows)
    query = pl.program_id(0) * s.queries + jax.lax.div(row, s.share)
    return (query * s.groups + pl.program_id(1)) * s.share + jax.lax.rem(row, s.share)


def meet(
    s: Sizes, union_ref: Any, count_ref: Any, spans_ref: Any, add: Callable[..., Any], state: Any
) -> Any:
    """`state = add(keys, here, state)` of all blocks, or parts of them, that a tile meets.

    `keys` are positions in a row, `here` the table of which row reads which of them.
    """
    member = jax.lax.div(jax.lax.iota(jnp.int32, s.rows), s.share)
    query = pl.program_id(0) * s.queries + member
    first, last = spans_ref[0, query], spans_ref[1, query]

    def one(n, state):
        code, part = union_ref[jax.lax.div(n, s.parts)], jax.lax.rem(n, s.parts) * s.columns
        begin = (code >> NEIGHBOURS) * s.size
        chose = ((code >> member) & 1) == 1
        end = jnp.where(chose, jnp.minimum(last, begin + s.size - 1), -1)  # no key before it
        here = seen((first[:, None], end[:, None]), positions(begin + part, s.columns)[None])
        return add(pl.ds(begin + part, s.columns), here, state)

    return jax.lax.fori_loop(0, count_ref[0] * s.parts, one, state)


def told_specs(s: Sizes) -> list[pl.BlockSpec]:
    """What is told of a tile of queries: the blocks it meets, how many, and all spans."""
    return [
        pl.BlockSpec((None, None, None, s.queries * s.each), lambda i, g, b: (b, g, i, 0)),
        pl.BlockSpec((None, None, None, 1), lambda i, g, b: (b, g, i, 0)),
        pl.BlockSpec((None, 2, s.length), lambda i, g, b: (b, 0, 0)),
    ]


def rows_spec(s: Sizes, *width: int) -> pl.BlockSpec:
    """All rows of a row of the batch."""
    shape = (None, s.length * s.groups * s.share, *width)
    return pl.BlockSpec(shape, lambda i, g, b: (b, 0, *(0 for _ in width)))


def stored_specs(s: Sizes) -> list[pl.BlockSpec]:
    """Keys and values of one head."""
    spec = functools.partial(pl.BlockSpec, index_map=lambda i, g, b: (b, 0, g, 0))
    return [spec((None, s.num_keys, None, width)) for width in (s.width, s.value_width)]
