"""The constants of Native Sparse Attention, and what each of its queries may read."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from lineage_jax.kernels.intervals import Intervals, intervals
from lineage_jax.typing import Array, Float, Int


class Branches(NamedTuple):
    """One of something for each branch, such as its keys: each branch learns its own.

    Attributes:
      compressed: of blocks, each squeezed into one key; every query reads all that are behind it.
      selected: of the few blocks that matter most to a query, as they are.
      window: of the last positions.
    """

    compressed: Any
    selected: Any
    window: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """What is read, in positions; the defaults are the paper's (Yuan et al. 2025, section 4.1)."""

    compressed_size: int = 32
    """Positions that one compressed key stands for: l."""
    stride: int = 16
    """From one compressed key's first position to the next one's: d."""
    block_size: int = 64
    """Positions in a block that is selected: l'."""
    num_blocks: int = 16
    """Blocks that a query selects, those that it always does included: n."""
    num_first: int = 1
    """Blocks at the beginning of a document that are always selected."""
    num_local: int = 2
    """Blocks up to the query's own that are always selected."""
    window: int = 512
    """Last positions read, the query's own included: w."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("num_first", "num_local") else 1
            if getattr(self, field.name) < least:
                raise ValueError(
                    f"{field.name} must be at least {least}, got {getattr(self, field.name)}"
                )
        for name in ("compressed_size", "block_size"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"stride={self.stride} must divide {name}={getattr(self, name)} "
                    "(section 3.3.2: blocks of either kind begin and end at multiples of it)"
                )
        if self.compressed_size > self.block_size:
            raise ValueError(
                f"compressed_size={self.compressed_size} must be at most "
                f"block_size={self.block_size}"
            )
        if self.num_first + self.num_local > self.num_blocks:
            raise ValueError(
                f"num_blocks={self.num_blocks} must have room for num_first={self.num_first} and "
                f"num_local={self.num_local}"
            )

    def num_compressed(self, length: int) -> int:
        """Compressed keys of so many positions; the last ones may lack some, and are not read."""
        return -(-length // self.stride)

    def num_selectable(self, length: int) -> int:
        """Blocks of so many positions, the last one perhaps incomplete."""
        return -(-length // self.block_size)


PAPER = NSAConfig()
"""What Yuan et al. 2025 trained."""


def reach(
    query: Float[Array, "B T H K"],
    segment_ids: Int[Array, "B S"] | None = None,
    offset: int | Int[Array, ""] = 0,
) -> Intervals:
    """The positions that queries may read at all: those of their documents, up to their own.

    Args:
      query: projected heads.
      segment_ids: which document each key belongs to, its positions side by side; one document if
        not given.
      offset: where the first query stands among the keys.

    Raises:
      ValueError: for queries whose document is not told.
    """
    num_keys = jnp.iinfo(jnp.int32).max if segment_ids is None else segment_ids.shape[1]
    told: dict[str, Any] = dict(segment_ids=segment_ids, offset=offset)
    first, last = intervals(query.shape[1], num_keys, **told)
    return Intervals(*(jnp.broadcast_to(x, query.shape[:2]) for x in (first, last)))


def compressed_reads(reach: Intervals, config: NSAConfig) -> Intervals:
    """The compressed keys that queries may read: those of which they may read every position."""
    first = -(-reach.first // config.stride)
    return Intervals(first, (reach.last + 1 - config.compressed_size) // config.stride)
