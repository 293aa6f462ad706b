"""How a table of scores is cut into tiles, and which of them anybody reads."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lineage_jax.kernels.intervals import Intervals
from lineage_jax.typing import Array, Bool, DTypeLike, Float, Int

LANES = 128
"""Numbers in a row of a TPU's vector registers."""

MASKED = -1e30  # finite, so that differences of two masked scores are not NaN

TILE = 1024
"""Queries, or keys, in a tile at most."""

PAIRS = 2**17
"""Pairs of tiles that one call lists at most: half of a TPU's 1 MiB of memory for scalars."""

CHUNK_BYTES = 12 * 2**20
"""Of float32 gradients of keys and values that stay on the chip together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What is known of intervals before they are computed.

    It decides tiles, and what a call is said to cost. A window is a promise besides: keys beyond
    it may be left out.

    Attributes:
      diagonal: whether an interval's end moves along with its query.
      window: how many keys an interval has at most, if its end moves by one key a query at most;
        None if as many as there are.
    """

    diagonal: bool = False
    window: int | None = None

    def table(self, length: int, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last key of each query, if it reads what it may."""
        last = np.full(length, num_keys - 1)
        if self.diagonal:
            slope = min(1.0, num_keys / length)
            last -= np.floor(slope * np.arange(length)[::-1]).astype(int)
        first = np.zeros_like(last) if self.window is None else last - self.window + 1
        return np.maximum(first, 0), last


UNKNOWN = Expected()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """The shape of one call, and how it is cut.

    Attributes:
      batch, heads, groups: of queries [B, T, H, K] and keys [B, S, G, K].
      length, num_keys: T and S, whole tiles of them.
      width, value_width: of a head of queries and keys, and of values.
      rows, columns: queries and keys in a tile.
      expected: what is known of what is read.
      chunk_bytes: of float32 gradients of keys and values that stay on the chip together.
    """

    batch: int
    heads: int
    groups: int
    length: int
    num_keys: int
    width: int
    value_width: int
    rows: int
    columns: int
    expected: Expected = UNKNOWN
    chunk_bytes: int = CHUNK_BYTES

    @property
    def share(self) -> int:
        """Heads of queries that read one head of keys."""
        return self.heads // self.groups

    @property
    def num_rows(self) -> int:
        """Tiles of queries."""
        return self.length // self.rows

    @property
    def num_columns(self) -> int:
        """Tiles of keys."""
        return self.num_keys // self.columns

    @property
    def chunk(self) -> int:
        """Tiles of keys whose gradients stay on the chip together."""
        most = max(1, self.chunk_bytes // (4 * self.columns * (self.width + self.value_width)))
        return -(-self.num_columns // -(-self.num_columns // most))

    @property
    def chunks(self) -> int:
        """How many times that is all of them."""
        return -(-self.num_columns // self.chunk)

    @functools.cached_property
    def pairs(self) -> int:
        """Tiles of scores that are computed, of one head, if what is read is as expected."""
        return int(self._expected.sum())

    @functools.cached_property
    def masked(self) -> float:
        """The share of these in which some score is hidden: a causal mask's diagonal."""
        first, last = self.expected.table(self.length, self.num_keys)
        first, last = (x.reshape(-1, self.rows) for x in (first, last))
        whole = (last.min(1) + 1) // self.columns - -(-first.max(1) // self.columns)
        return 1 - int(np.maximum(whole, 0).sum()) / self.pairs

    def bytes_of_key(self, dtype: DTypeLike) -> int:
        """Of one position of one head of keys and values."""
        return (self.width + self.value_width) * jnp.dtype(dtype).itemsize

    @property
    def _expected(self) -> np.ndarray:
        first, last = self.expected.table(self.length, self.num_keys)
        first, last = (x.reshape(-1, self.rows) for x in (first, last))
        return last.max(1) // self.columns - first.min(1) // self.columns + 1


def cut(
    query: tuple[int, ...],
    keys: tuple[int, ...],
    value_width: int,
    expected: Expected,
    *,
    tile: int | None = None,
    chunk_bytes: int | None = None,
) -> Blocks:
    """Blocks for arrays of these shapes.

    Tiles are as large as may be with little padding; where a window is short, those that cost
    least, as large ones compute more beside it and small ones take more steps.

    Args:
      query, keys: shapes.
      value_width: of a head of values.
      expected: what is known of what is read.
      tile: queries, or keys, in a tile at most; TILE if not given.
      chunk_bytes: of `Blocks`; CHUNK_BYTES if not given.
    """
    (batch, length, heads, width), (_, num_keys, groups, _) = query, keys

    def blocks(rows: int, columns: int) -> Blocks:
        return Blocks(
            batch=batch,
            heads=heads,
            groups=groups,
            length=-(-length // rows) * rows,
            num_keys=-(-num_keys // columns) * columns,
            width=width,
            value_width=value_width,
            rows=rows,
            columns=columns,
            expected=expected,
            chunk_bytes=chunk_bytes or CHUNK_BYTES,
        )

    of_queries, of_keys = sides(length, tile or TILE), sides(num_keys, tile or TILE)
    if expected.window is None:
        return blocks(of_queries[0], of_keys[0])
    choices = (blocks(rows, columns) for rows in of_queries for columns in of_keys)
    return min(choices, key=lambda b: b.pairs * (b.rows * b.columns + STEP) + b.length * ROW)


STEP, ROW = 150_000, 100
"""What a step of the grid, and a query, cost besides scores, in scores: between those of v5e and
v6e, from the bundles of the forward kernel (`experiments/LOG.md`)."""


def sides(length: int, tile: int) -> list[int]:
    """Sizes of tiles to choose from, the one that pads least first."""
    whole = -(-length // LANES) * LANES
    if whole <= tile:
        return [whole, *(n for n in (512, 256) if n < whole)]
    sizes = [n for n in (1024, 768, 512, 256, 128) if n <= tile]
    most = [n for n in sizes if 2 * n >= tile]
    best = min(most, key=lambda n: -(-length // n) * n)
    return [best, *(n for n in sizes if n < best and n >= 256)]


class Pairs(NamedTuple):
    """Which tile of keys meets which tile of queries, in the order of the queries.

    Attributes:
      codes: of each step of each row [rows * steps at most]: FIRST and so on, then the tile of keys
        from bit KEYS_AT on, and that of queries from QUERIES_AT on.
      steps: how many there are in the longest row. Shorter ones do nothing at their ends.
    """

    codes: Int[Array, "N"]
    steps: Int[Array, ""]


FIRST, LAST, READ, HIDDEN = 1, 2, 4, 8
"""Of a step: the first or last of its tile of queries, any score is read, any is hidden."""

KEYS_AT, QUERIES_AT = 4, 17
"""Tiles are numbered with 13 bits: eight million positions in tiles of 1024."""


def pairs_of(
    blocks: Blocks, reads: Intervals, chunk: int | Array = 0, size: int | None = None
) -> Pairs:
    """The pairs of tiles in which anything is read.

    Every tile of queries has a step at least, or if only a chunk of the keys is asked for, every
    row.

    Args:
      blocks: of the call.
      reads: of whole tiles of queries.
      chunk, size: which chunk of the keys, of how many tiles; all keys if not given.
    """
    rows = reads.first.shape[0]
    empty = reads.first > reads.last

    def of_tiles(x: Array, fill: int, reduce: Callable[..., Array]) -> Array:
        return reduce(jnp.where(empty, fill, x).reshape(rows, -1, blocks.rows), axis=2)

    size_, none = blocks.columns, blocks.num_keys
    begin = of_tiles(reads.first, none, jnp.min) // size_
    end = of_tiles(reads.last, -1, jnp.max) // size_
    whole_begin = -(-of_tiles(reads.first, none, jnp.max) // size_)
    whole_end = (of_tiles(reads.last, -1, jnp.min) + 1) // size_ - 1
    if size is not None:
        begin, end = jnp.maximum(begin, chunk * size), jnp.minimum(end, chunk * size + size - 1)
    some = begin <= end
    counts = jnp.where(some, end - begin + 1, 0 if size is not None else 1)
    counts = counts.at[:, 0].max((counts.sum(1) == 0).astype(counts.dtype))
    begin = jnp.where(some, begin, 0 if size is None else chunk * size)
    ends = jnp.cumsum(counts, axis=1)  # rows, tiles of queries
    total = ends[:, -1:]
    step = jnp.arange(blocks.num_rows * (size or blocks.num_columns))[None]
    at = jnp.minimum(step, total - 1)  # rows, steps
    past = at[..., None] >= ends[:, None, :-1]  # of each tile of queries but the last

    def taken(x: Array) -> Array:
        """x of the tile of queries of each step; a sum, because a TPU gathers slowly."""
        return x[:, :1] + (past * jnp.diff(x, axis=1)[:, None]).sum(-1)

    i, within = past.sum(-1), at - taken(ends - counts)
    j = taken(begin) + within
    flags = (
        FIRST * (within == 0)
        + LAST * (within == taken(counts) - 1)
        + READ * taken(some.astype(jnp.int32))
        + HIDDEN * ((j < taken(whole_begin)) | (j > taken(whole_end)))
    )
    flags = jnp.where(step < total, flags, 0)
    codes = (i << QUERIES_AT) | (j << KEYS_AT) | flags
    return Pairs(codes.astype(jnp.int32).ravel(), total.max().astype(jnp.int32))


def padded_reads(blocks: Blocks, reads: Intervals) -> Intervals:
    """Of whole tiles of queries: padding reads what the last query does, and counts for nothing."""
    ends = ((0, 0), (0, blocks.length - reads.first.shape[1]))
    return Intervals(*(jnp.pad(x, ends, mode="edge") for x in reads))


def visible(reads: Intervals, num_keys: int) -> Bool[Array, "#B T S"]:
    """The table of which query reads which key."""
    at = jnp.arange(num_keys)[None, None]
    return (at >= reads.first[..., None]) & (at <= reads.last[..., None])


def aligned(width: int) -> bool:
    """Whether heads of that width fill whole rows of lanes, and are `stored` side by side."""
    return width % LANES == 0


def stored(heads: Float[Array, "B T H K"], together: int = 1) -> Float[Array, "..."]:
    """Heads as kernels read them from memory: nothing between them and the products around.

    A linear map writes a position's heads side by side, and reads them so. Where those that a step
    of a kernel takes `together` fill whole rows of lanes, it takes their columns of that:
    [B, T, H K]. Any other head has to be a matrix of its own: [B, H, T, K].
    """
    if aligned(together * heads.shape[-1]):
        return heads.reshape(*heads.shape[:2], -1)
    return heads.swapaxes(1, 2)


def unstored(stored: Float[Array, "..."], width: int, together: int = 1) -> Float[Array, "B T H K"]:
    """The heads of some width that are `stored` so."""
    if aligned(together * width):
        return stored.reshape(*stored.shape[:2], -1, width)
    return stored.swapaxes(1, 2)
