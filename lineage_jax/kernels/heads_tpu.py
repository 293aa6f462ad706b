"""How a kernel for TPU reads heads as they are stored: one or several of them in a step.

Where the heads of a step fill whole rows of lanes together, it takes their columns of what a linear
map wrote, and turns those that begin within a row: its units for it have little else to do. So
nothing is copied around the kernel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl

from lineage_jax.kernels.blocks import LANES, aligned, stored, unstored
from lineage_jax.typing import Array, Float

Places = Callable[..., tuple[Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Heads:
    """How the heads of a step lie in memory.

    Attributes:
      width: of one.
      together: how many there are in a step.
    """

    width: int
    together: int = 1

    @property
    def beside(self) -> bool:
        """Whether all are side by side, [B, T, H K], and not matrices, [B, H, T, K]."""
        return aligned(self.together * self.width)

    def stored(self, heads: Float[Array, "B T H K"]) -> Float[Array, "..."]:
        """Heads as a kernel reads them."""
        return stored(heads, self.together)

    def unstored(self, heads: Float[Array, "..."]) -> Float[Array, "B T H K"]:
        """Heads that a kernel wrote."""
        return unstored(heads, self.width, self.together)

    def shape(self, batch: int, length: int, heads: int) -> tuple[int, ...]:
        """Of all heads, as they are stored."""
        if self.beside:
            return batch, length, heads * self.width
        return batch, heads, length, self.width

    def spec(self, rows: int, where: Places) -> pl.BlockSpec:
        """Some positions of the heads of a step; of one head, [rows, K].

        Args:
          rows: how many positions.
          where: from indices of the grid to the row of the batch, the heads, and the positions, by
            number among those of other steps.
        """

        def columns(*at):
            n, h, i = where(*at)
            return n, i, h

        def matrices(*at):
            return *where(*at), 0

        if self.beside:
            return pl.BlockSpec((None, rows, self.together * self.width), columns)
        together = self.together if self.together > 1 else None
        return pl.BlockSpec((None, together, rows, self.width), matrices)

    def spec_from(self, rows: int, where: Places) -> pl.BlockSpec:
        """Some positions of one head, from any row of lanes on, [rows, K].

        Args:
          rows: how many positions.
          where: from indices of the grid to the row of the batch, the head, and the first position.
        """

        def columns(*at):
            n, h, start = where(*at)
            return n, pl.multiple_of(start, LANES), pl.multiple_of(h * self.width, LANES)

        def matrix(*at):
            n, h, start = where(*at)
            return n, h, pl.multiple_of(start, LANES), 0

        if self.beside:
            return pl.BlockSpec((None, pl.Element(rows), pl.Element(self.width)), columns)
        return pl.BlockSpec((None, None, pl.Element(rows), pl.Element(self.width)), matrix)

    def at(self, head: int, rows: slice) -> tuple[Any, slice]:
        """Where some positions of a head are in a step's block, [rows, K]."""
        if self.beside or self.together == 1:
            return rows, slice(head * self.width, (head + 1) * self.width)
        return head, rows
