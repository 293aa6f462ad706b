"""How queries that read a window meet their keys: a tile of them in one step.

The keys of neighbouring queries lie in a band. Where the last key moves by at most one from query
to query, and no query reads more than a window, a tile of queries reads so few keys that their
scores fit on a chip all at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from lineage_jax.kernels.blocks import LANES, PAIRS, Expected
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.typing import Array, Int

LONGEST = 1024
"""Keys in a window at most: with more, scores of a tile do not stay near the units that use them,
and tiles of `lineage_jax.kernels.blocks` waste little."""
WORK = 16
"""Heads times tiles of queries in a step of the grid, at most: some thousand instructions, beside
which it is little to begin a step."""
TILES = 8
"""Of them, tiles of queries at most."""
FEW = 4
"""Heads that share their keys, at least, for a backward pass of its own: its keys are fetched, and
their gradients added up, once for all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """The shape of one call, and how it is cut.

    Attributes:
      batch, heads, groups: of queries [B, T, H, K] and keys [B, S, G, K].
      length: T, in whole steps.
      num_keys: S, in whole rows of lanes.
      width, value_width: of a head of queries and keys, and of values.
      window: keys that a query reads at most.
      tiles: tiles of queries in a step.
    """

    batch: int
    heads: int
    groups: int
    length: int
    num_keys: int
    width: int
    value_width: int
    window: int
    tiles: int

    @property
    def share(self) -> int:
        """Heads of queries that read one head of keys."""
        return self.heads // self.groups

    @property
    def together(self) -> int:
        """Of them, those in a step."""
        return max(n for n in range(1, min(self.share, WORK) + 1) if self.share % n == 0)

    @property
    def rows(self) -> int:
        """Queries in a step."""
        return self.tiles * LANES

    @property
    def steps(self) -> int:
        """Of one head."""
        return self.length // self.rows

    @property
    def columns(self) -> int:
        """Keys that a tile meets, if the last one that it reads ends a row of lanes."""
        return min(whole(self.window + LANES - 1), self.num_keys)

    @property
    def wide(self) -> int:
        """Keys that a tile meets wherever they begin."""
        return min(self.columns + LANES, self.num_keys)

    @property
    def fetched(self) -> int:
        """Keys that a step meets."""
        return min(self.wide + self.rows - LANES, self.num_keys)

    @property
    def scores(self) -> int:
        """Of the whole call."""
        return self.batch * self.heads * self.length * self.columns

    def padded(self, reads: Intervals) -> Intervals:
        """Of whole steps: padding reads nothing."""
        ends = ((0, 0), (0, self.length - reads.first.shape[1]))
        first, last = (
            jnp.pad(x, ends, constant_values=fill) for x, fill in zip(reads, (0, -1), strict=True)
        )
        return Intervals(first, last)

    def bytes_of_keys(self, stored: Sequence[Array]) -> int:
        """That are read of keys and values, by all steps of a group in turn."""
        each = sum(x.shape[-1] * x.dtype.itemsize for x in stored)
        return self.batch * self.groups * self.steps * self.fetched * each


def whole(size: int) -> int:
    """At least so many, in whole rows of lanes."""
    return -(-size // LANES) * LANES


def band_of(
    query: tuple[int, ...],
    keys: tuple[int, ...],
    value_width: int,
    expected: Expected,
    *,
    lists: int,
    backward: bool = False,
) -> Band | None:
    """For arrays of these shapes; None if they are better cut into `blocks.Blocks`.

    Args:
      query, keys: shapes.
      value_width: of a head of values.
      expected: what is known of what is read.
      lists: rows of the batch that differ in what they read.
      backward: whether gradients are asked for.
    """
    (batch, length, heads, width), (_, num_keys, groups, _) = query, keys
    if not expected.diagonal or expected.window is None or expected.window > LONGEST:
        return None
    if backward and heads // groups < FEW:
        return None
    count = whole(length) // LANES
    band = Band(
        batch=batch,
        heads=heads,
        groups=groups,
        length=count * LANES,
        num_keys=whole(num_keys),
        width=width,
        value_width=value_width,
        window=expected.window,
        tiles=1,
    )
    if lists * (count + band.num_keys // LANES) > PAIRS:
        return None
    if backward:
        return band
    tiles = min(TILES, WORK // band.together, count)
    return dataclasses.replace(band, tiles=tiles, length=-(-count // tiles) * tiles * LANES)


class Meeting(NamedTuple):
    """Which keys the queries of a call meet.

    Attributes:
      bases: the first key of each step [#B, steps].
      begins: that of each of its tiles [#B, tiles].
      wide: whether the tiles of a step meet `Band.wide` keys, or `Band.columns` [#B, steps].
    """

    bases: Int[Array, "N steps"]
    begins: Int[Array, "N tiles"]
    wide: Any


def meeting(band: Band, reads: Intervals) -> Meeting:
    """Which keys those are, all in whole rows of lanes.

    Args:
      band: of the call.
      reads: of whole steps.
    """
    b, rows = band, reads.first.shape[0]
    empty = (reads.first > reads.last).reshape(rows, -1, LANES)
    first, last = (x.reshape(rows, -1, LANES) for x in reads)
    first = jnp.where(empty, b.num_keys, first).min(2)
    end = jnp.where(empty, -1, last).max(2) // LANES * LANES + LANES
    begins_late = first >= end - b.columns
    end = jnp.maximum.accumulate(end, axis=1)  # a tile that reads nothing is where the last one was
    of_steps = end.reshape(rows, -1, b.tiles)
    wide = ~begins_late.reshape(of_steps.shape).all(2)
    bases = jnp.maximum(of_steps[:, :, -1] - b.fetched, 0)
    size = jnp.where(wide, b.wide, b.columns)[..., None]
    within = jnp.maximum(of_steps - size, 0) - bases[..., None]
    begins = bases[..., None] + jnp.clip(within, 0, b.fetched - size)
    return Meeting(bases, begins.reshape(end.shape), wide)


MEET, WRITE, WIDE, LATE = 1, 2, 4, 8
"""Of a step of the backward pass: a tile of queries meets its keys; no later one reads the first of
their rows of lanes; they are `Band.wide`; they begin a row of lanes after the first one."""
TILE_AT = 4
"""The tile is numbered from this bit on."""


class Walk(NamedTuple):
    """The steps of the backward pass, of which each may be the last for some keys.

    Attributes:
      codes: of each step [#B, steps at most]: MEET and so on, then the tile of queries.
      blocks: the first row of lanes of keys that anything is still added to, by number.
      steps: how many there are in the longest row. Shorter ones do nothing at their ends.
    """

    codes: Int[Array, "N steps"]
    blocks: Int[Array, "N steps"]
    steps: Any


def walk(band: Band, reads: Intervals) -> Walk:
    """In the order of queries, and of keys: every tile is met once, all keys are written once.

    Args:
      band: of the call, with one tile in a step.
      reads: of whole steps.
    """
    tiles, rows = meeting(band, reads), reads.first.shape[0]
    count, keys = tiles.begins.shape[1], band.num_keys // LANES
    first = tiles.bases // LANES
    differs = jnp.diff(first, axis=1) != 0
    begins = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    found = jnp.cumsum(begins, axis=1)  # so many different first rows of keys
    number = jnp.arange(count)[None]
    at = number + first - (found - 1)  # after a step for each row of keys that is none's first
    codes = MEET + WRITE * ends + WIDE * tiles.wide + LATE * (tiles.begins > tiles.bases)
    codes = jnp.zeros((rows, count + keys), jnp.int32).at[jnp.arange(rows)[:, None], at].set(codes)
    total = count + keys - found[:, -1:]
    meet = codes & MEET
    more = (meet == 0) & (jnp.arange(count + keys)[None] < total)
    codes += WRITE * more
    tile = jnp.maximum(jnp.cumsum(meet, axis=1) - 1, 0)
    written = codes // WRITE & 1
    blocks = jnp.minimum(jnp.cumsum(written, axis=1) - written, keys - 1)
    return Walk(codes + (tile << TILE_AT), blocks, total.max())
