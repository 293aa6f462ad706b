"""What the kernels for GPU have in common: tiles, heads cut into powers of two, and products.

Triton computes with arrays whose sizes are powers of two. A head of another width is read in
parts, one for each power of two in it; what is no multiple of 16 is filled up with zeros before,
since rows that begin anywhere are read a few bytes at a time.
"""

import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from lineage_jax.kernels.blocks import Blocks
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.typing import Array, Float, Int

LEAST = -1e20
"""Where the largest score of a query starts: masked scores, scaled, have no weight beside it."""
SIDE = 16
"""Rows, columns and widths that a product has at least."""


class Tiles(NamedTuple):
    """How a kernel is cut.

    Attributes:
      rows, columns: queries and keys in a tile at most.
      warps: of 32 threads, that compute a tile.
      stages: tiles that are fetched while one is computed, and that one.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def fitted(self, row: int, column: int) -> "Tiles":
        """The same, or smaller if memory would not have room for it.

        Args:
          row, column: bytes that are kept for each; for what is fetched ahead, for all stages.
        """
        rows, columns = self.rows, self.columns
        while rows * row + columns * column > shared_bytes() and max(rows, columns) > SIDE:
            rows, columns = (rows, columns // 2) if columns >= rows else (rows // 2, columns)
        return self._replace(rows=rows, columns=columns)

    @property
    def params(self) -> plgpu.CompilerParams:
        """For the compiler."""
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


SHARED_BYTES = {"7.5": 64, "8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "12.0": 99}
"""KiB of shared memory that a program may have, by what a GPU is capable of; of others, 227 (CUDA
C++ Programming Guide, "Compute Capabilities")."""
SPARE_BYTES = 10 * 1024
"""Of it, for what warps tell one another."""


def shared_bytes() -> int:
    """What tiles may take of the GPU that is here; of an H200 if there is none."""
    try:
        capability = str(jax.local_devices(backend="gpu")[0].compute_capability)
    except RuntimeError:
        capability = "9.0"
    return SHARED_BYTES.get(capability, 227) * 1024 - SPARE_BYTES


def power_of_two(size: int) -> int:
    """The least one that is not less."""
    return 1 << max(0, size - 1).bit_length()


def whole(width: int) -> int:
    """The width of heads that are filled up."""
    return -(-width // SIDE) * SIDE


def parts(width: int) -> list[slice]:
    """Powers of two that make up a whole width, the largest first."""
    found, start = [], 0
    for size in (1 << bit for bit in reversed(range(width.bit_length()))):
        if width & size:
            found.append(slice(start, start + size))
            start += size
    return found


def filled(heads: Float[Array, "B T H K"], length: int) -> Float[Array, "B S H E"]:
    """As many positions as wanted, and a whole width; nothing is moved if both are so already."""
    ends = (0, length - heads.shape[1]), (0, whole(heads.shape[-1]) - heads.shape[-1])
    return jnp.pad(heads, ((0, 0), ends[0], (0, 0), ends[1]))


def read(ref: Any, *at: Any) -> tuple[Any, ...]:
    """Rows of a matrix in parts of its width."""
    return tuple(ref[(*at, part)] for part in parts(ref.shape[-1]))


def write(ref: Any, found: tuple[Any, ...], *at: Any) -> None:
    """The same in parts, to memory."""
    for part, x in zip(parts(ref.shape[-1]), found, strict=True):
        ref[(*at, part)] = x.astype(ref.dtype)


def zeros(rows: int, width: int) -> tuple[Any, ...]:
    """Sums of a matrix in parts of its width."""
    return tuple(jnp.zeros((rows, x.stop - x.start), jnp.float32) for x in parts(width))


class Arithmetic(NamedTuple):
    """What kernels compute, in the instructions that a GPU has for it.

    Attributes:
      interpret: any device computes the same.
    """

    interpret: bool

    def product(self, a: Any, b: Any, contract: tuple[int, int]) -> Any:
        """a b, contracted over one axis each, accumulated in float32.

        Of float32, three products of its upper and lower bits, which matrix units take and which
        come close to it; without these a kernel would be compiled for minutes and be slow.
        """
        precision: Any = None
        if a.dtype == jnp.float32:
            exact, three = jax.lax.Precision.HIGHEST, jax.lax.DotAlgorithmPreset
            precision = exact if self.interpret else three.TF32_TF32_F32_X3
        axes = (((contract[0],), (contract[1],)), ((), ()))
        options = dict(precision=precision, preferred_element_type=jnp.float32)
        return jax.lax.dot_general(a, b, axes, **options)

    def inner_products(self, rows: tuple[Any, ...], columns: tuple[Any, ...]) -> Any:
        """Of every row with every column, both in parts of their width."""
        return sum(self.product(a, b, (1, 1)) for a, b in zip(rows, columns, strict=True))

    def add_products(
        self, sums: tuple[Any, ...], weights: Any, rows: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Sums, in parts, and rows by their weights."""
        weights = weights.astype(rows[0].dtype)
        pairs = zip(sums, rows, strict=True)
        return tuple(x + self.product(weights, y, (1, 0)) for x, y in pairs)

    def powers(self, scores: Any, scale: float, less: Any) -> Any:
        """2 to the power of scores, times `scale`, less what there is of each row or column.

        In the two instructions that this takes: written as a formula, numbers are rounded once more
        between, and numbers that are nearly none are computed apart from others.
        """
        if self.interpret:
            return jnp.exp2(scores * scale - less)
        [bits] = struct.unpack("<I", struct.pack("<f", scale))
        code = f"{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{bits:08X}, $2; ex2.approx.ftz.f32 $0, x; }}"
        [found] = plgpu.elementwise_inline_asm(
            code,
            args=[scores, jnp.broadcast_to(-less, scores.shape)],
            constraints="=f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)],
        )
        return found


def cut(query: Array, keys: Array, values: Array, tiles: Tiles) -> Blocks:
    """The shape of one call in whole tiles and whole widths, of [B, T, H, K] and [B, S, G, K]."""
    (batch, length, heads, width), (_, num_keys, groups, _) = query.shape, keys.shape
    rows = min(tiles.rows, max(SIDE, power_of_two(length)))
    columns = min(tiles.columns, max(SIDE, power_of_two(num_keys)))
    return Blocks(
        batch=batch,
        heads=heads,
        groups=groups,
        length=-(-length // rows) * rows,
        num_keys=-(-num_keys // columns) * columns,
        width=whole(width),
        value_width=whole(values.shape[-1]),
        rows=rows,
        columns=columns,
    )


class Met(NamedTuple):
    """Which tiles a tile meets: those from `begin` on and before `end`.

    Of these, every score is read in those from `whole_begin` on and before `whole_end`.
    """

    begin: Array
    whole_begin: Array
    whole_end: Array
    end: Array

    def stacked(self) -> Int[Array, "#B tiles 4"]:
        """In one array, for a kernel, with some of the order that may be missing."""
        end = jnp.maximum(self.begin, self.end)
        whole_begin = jnp.clip(self.whole_begin, self.begin, end)
        whole_end = jnp.clip(self.whole_end, whole_begin, end)
        return jnp.stack((self.begin, whole_begin, whole_end, end), -1).astype(jnp.int32)


def keys_met(blocks: Blocks, reads: Intervals) -> Met:
    """The tiles of keys that each tile of queries meets."""
    empty = reads.first > reads.last

    def of_tiles(x: Array, fill: int, reduce: Any) -> Array:
        x = jnp.where(empty, fill, x)
        return reduce(x.reshape(x.shape[0], -1, blocks.rows), axis=2)

    size, none = blocks.columns, blocks.num_keys
    return Met(
        of_tiles(reads.first, none, jnp.min) // size,
        -(-of_tiles(reads.first, none, jnp.max) // size),
        (of_tiles(reads.last, -1, jnp.min) + 1) // size,
        of_tiles(reads.last, -1, jnp.max) // size + 1,
    )


def queries_met(blocks: Blocks, reads: Intervals) -> Met:
    """The tiles of queries that each tile of keys meets.

    These lie side by side, as neither end of an interval goes back; where some of a tile's queries
    read nothing, its neighbours tell where it would.
    """
    met, tile = keys_met(blocks, reads), jnp.arange(blocks.num_columns)[None, None]

    def before(bound: Array) -> Array:
        """How many tiles of queries have a bound that is at most the number of a tile of keys."""
        return (bound[..., None] <= tile).sum(1)

    begins, whole_begins = (
        jax.lax.cummin(x, axis=1, reverse=True) for x in (met.begin, met.whole_begin)
    )
    ends, whole_ends = (jax.lax.cummax(x, axis=1) for x in (met.end, met.whole_end))
    return Met(*map(before, (ends, whole_ends, whole_begins, begins)))


def meet(met_ref: Any, state: Any, tile: Any, heads: int = 1) -> Any:
    """`state = tile(masked)(j, r, state)` of all tiles j that are met and heads r, in some order.

    Heads and tiles are one loop, so that what is fetched ahead never runs out between.

    Args:
      met_ref: of `Met.stacked`, of this tile.
      state: what it is at first.
      tile: gives a function, for tiles in which some scores are hidden or in which all are read.
      heads: how many.
    """
    bounds = [met_ref[n] for n in range(4)]
    for masked, begin, end in zip((True, False, True), bounds, bounds[1:], strict=False):
        state = jax.lax.fori_loop(
            0, heads * (end - begin), in_turn(tile(masked), begin, end - begin, heads), state
        )
    return state


def in_turn(meet: Any, begin: Any, count: Any, heads: int) -> Any:
    """The body of a loop that meets tiles from `begin` on, `count` of them for each head."""

    def body(n: Any, state: Any) -> Any:
        if heads == 1:
            return meet(begin + n, 0, state)
        return meet(begin + jax.lax.rem(n, count), jax.lax.div(n, count), state)

    return body


def seen(reads: tuple[Any, Any], keys: Any) -> Any:
    """Which of some keys are read, by the first and the last ones that are, of the same rank."""
    return (keys >= reads[0]) & (keys <= reads[1])


def positions(start: Any, size: int) -> Any:
    """Numbers from one on."""
    return start + jax.lax.iota(jnp.int32, size)
