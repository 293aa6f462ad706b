"""Blocks of keys and values without gaps, as a TPU reads them.

A matrix unit takes rows of 128 or 256 numbers, and loads so many of them, key by key, before a few
rows of queries meet them: the loads are what costs. A key of 192 leaves 64 of 256 empty. So the
last keys of a block have no rows of their own: in pieces, they lie in the gaps of the others, and
what meets a row is twice the queries, once for the key in front and once for the piece behind it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lineage_jax.kernels.blocks import LANES
from lineage_jax.kernels.flash_tpu import product
from lineage_jax.kernels.native_sparse.blockwise import in_blocks
from lineage_jax.typing import Array, Float


class Piece(NamedTuple):
    """Columns of all keys of a block, as they are stored.

    Attributes:
      begin, width: the columns.
      hosts: parts of the block that have rows, if the last part lies in their gaps; or none.
      unit: columns of a piece of those, in a gap.
      row: where it begins in what is stored of a block.
      keys: that have rows.
      depth: rows of lanes of each.
    """

    begin: int
    width: int
    hosts: int
    unit: int
    row: int
    keys: int
    depth: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """How blocks of keys, or of values, are stored.

    Several blocks are read together, and their keys are in this order: the first part of each
    block, then the second of each, and so on.

    Attributes:
      width: of a key.
      size: keys in a block.
      across: columns that a product takes at once, a number of lanes.
      parts: equal ones, in which a block is cut; the last lies in the gaps of the others.
      cuts: in so many parts keys are in order, a multiple of `parts`.
    """

    width: int
    size: int
    across: int
    parts: int
    cuts: int

    @property
    def pieces(self) -> list[Piece]:
        """Of whole width, and what is left of the columns."""
        found, row = list[Piece](), 0
        for begin in range(0, self.width, self.across):
            width, keys, hosts, unit = min(self.across, self.width - begin), self.size, 0, 0
            if width < self.across and self.parts > 1:
                hosts = self.parts - 1
                unit, keys = -(-width // hosts), self.size * hosts // self.parts
            depth = -(-(width + unit) // LANES)
            found.append(Piece(begin, width, hosts, unit, row, keys, depth))
            row += depth * keys
        return found

    @property
    def rows(self) -> int:
        """Rows of lanes of a block."""
        last = self.pieces[-1]
        return last.row + last.depth * last.keys

    def stored(self, heads: Float[Array, "B S G K"]) -> Float[Array, "B G blocks rows lanes"]:
        """Blocks of keys or values, and one of zeros."""
        blocks, found = in_blocks(heads, self.size), []
        for piece in self.pieces:
            x = columns(blocks, piece.begin, piece.width)
            x, guests = x[..., : piece.keys, :], x[..., piece.keys :, :]
            if piece.hosts:
                units = [columns(guests, i * piece.unit, piece.unit) for i in range(piece.hosts)]
                x = jnp.concatenate([x, jnp.concatenate(units, -2)], -1)
            found += [columns(x, i * LANES, LANES) for i in range(piece.depth)]
        return jnp.pad(jnp.concatenate(found, -2), ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))

    def laid(self, heads: Any) -> list[list[Any]]:
        """The heads of a query as rows meet them: of each piece, for each part with rows."""
        found = []
        for piece in self.pieces:
            x, lanes = heads[:, piece.begin : piece.begin + piece.width], piece.depth * LANES
            units = [x[:, i * piece.unit :][:, : piece.unit] for i in range(piece.hosts)]
            own, behind = placed(0, x, lanes), [placed(piece.width, unit, lanes) for unit in units]
            found.append([joined([own, x], 0) for x in behind] or [own])
        return found

    def scores(self, laid: Sequence[Sequence[Any]], blocks: Sequence[Any]) -> Any:
        """The heads of a query, as they were laid, times the keys of some blocks: [R, keys]."""
        found = []
        for piece, heads in zip(self.pieces, laid, strict=True):
            met = [product(x, self.read(piece, n, blocks), (1, 1)) for n, x in enumerate(heads)]
            if piece.hosts:
                share = met[0].shape[0] // 2
                met = [*(x[:share] for x in met), sum(x[share:] for x in met)]
            found.append(joined(met, 1))
        return sum(found[1:], found[0])

    def sums(self, weights: Any, blocks: Sequence[Any]) -> list[Any]:
        """Weights of the keys of some blocks, [R, keys], times these: to be added up, and `whole`.

        They are for each piece, and for each part with rows.
        """
        found, each = [], weights.shape[1] // self.parts
        for piece in self.pieces:
            parts = [weights]
            if piece.hosts:
                *parts, last = (weights[:, i * each :][:, :each] for i in range(self.parts))
                parts = [joined([x, last], 0) for x in parts]
            found += [product(x, self.read(piece, n, blocks), (1, 0)) for n, x in enumerate(parts)]
        return found

    def whole(self, sums: Sequence[Any]) -> Any:
        """Sums of keys, [R, K], from what `sums` gives, added up."""
        found, rest = [], list(sums)
        for piece in self.pieces:
            mine = [rest.pop(0) for _ in range(piece.hosts or 1)]
            if piece.hosts:
                share, end = mine[0].shape[0] // 2, piece.width + piece.unit
                behind = joined([x[share:, piece.width : end] for x in mine], 1)
                own = sum(x[:share, : piece.width] for x in mine)
                found.append(own + behind[:, : piece.width])
            else:
                found.append(mine[0][:, : piece.width])
        return joined(found, 1)

    def read(self, piece: Piece, part: int, blocks: Sequence[Any]) -> Any:
        """Rows of one part of some blocks, in order; of all, if the last part has rows too."""
        each, count = self.size // self.cuts, self.cuts
        if piece.hosts:
            count //= self.parts
        cuts = range(part * count, (part + 1) * count)
        if len(blocks) == 1 or count == 1:
            cuts, each = range(part, part + 1), each * count
        begins = [piece.row + i * piece.keys for i in range(piece.depth)]
        rows = [
            joined([block[begin + n * each :][:each] for n in cuts for block in blocks], 0)
            for begin in begins
        ]
        return joined(rows, 1)

    def order(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the keys of so many blocks as they are read together, which block's, and which one."""
        key = np.arange(self.size).reshape(self.cuts, 1, -1)
        block = np.arange(count)[None, :, None]
        block, key = np.broadcast_arrays(block, key)
        return block.ravel(), key.ravel()


def packed(widths: Sequence[int], across: Sequence[int], size: int, dtype: Any) -> list[Packed]:
    """How keys and values are stored, in one order.

    Args:
      widths: of keys and of values.
      across: columns that a product with each takes at once.
      size: of a block.
      dtype: of all.
    """
    parts = [most_parts(*of, size, dtype) for of in zip(widths, across, strict=True)]
    return [
        Packed(width=width, size=size, across=one, parts=n, cuts=max(parts))
        for width, one, n in zip(widths, across, parts, strict=True)
    ]


def most_parts(width: int, across: int, size: int, dtype: Any) -> int:
    """The fewest parts of which the last fits in the gaps of the others; 1 if it never does.

    They are a power of two, and each is a number of whole registers.
    """
    rest, parts, least = width % across, 2, 32 // jnp.dtype(dtype).itemsize
    while rest and size % (parts * least) == 0:
        if rest + -(-rest // (parts - 1)) <= across:
            return parts
        parts *= 2
    return 1


def columns(x: Any, begin: int, count: int) -> Any:
    """So many of them; zeros after the last."""
    x = x[..., begin : begin + count]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count - x.shape[-1])])


def placed(begin: int, x: Any, lanes: int) -> Any:
    """A matrix from that lane on, and zeros around."""
    before, after = begin, lanes - begin - x.shape[1]
    around = [jnp.zeros((x.shape[0], n), x.dtype) for n in (before, after)]
    return joined([part for part in (around[0], x, around[1]) if part.shape[1]], 1)


def joined(parts: Sequence[Any], axis: int) -> Any:
    """Below, or beside, one another."""
    return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]
