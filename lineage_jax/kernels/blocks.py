"""How a table of scores is cut into blocks, and which of them anybody reads."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from lineage_jax.typing import Array, Float

LANES = 128
"""Numbers in a row of a TPU's vector registers."""

CHUNK_BYTES = 8 * 2**20
"""Of a float32 gradient of queries that stays on the chip: half of the 16 MiB of a TPU v4."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The shape of one call, and how it is cut.

    Attributes:
      batch, heads, groups, length, width: of queries [B, T, H, K] and keys [B, T, G, K].
      size: queries, and keys, in a block.
      causal: whether a query reads only keys that are not after it.
      valid: positions that are no padding.
      one_document: whether all of these are.
    """

    batch: int
    heads: int
    groups: int
    length: int
    width: int
    size: int
    causal: bool
    valid: int
    one_document: bool

    @property
    def count(self) -> int:
        """Blocks of queries, and of keys."""
        return self.length // self.size

    @property
    def chunk(self) -> int:
        """Blocks of queries whose gradients stay on the chip together."""
        most = max(1, CHUNK_BYTES // (4 * self.size * self.width))
        return max(n for n in range(1, self.count + 1) if self.count % n == 0 and n <= most)

    @property
    def pairs(self) -> int:
        """Blocks of scores that are computed, of one head, if there is no window."""
        return self.count * (self.count + 1) // 2 if self.causal else self.count**2

    def keys_of(self, i: Any, window: Any) -> tuple[Any, Any]:
        """The first and the last block of keys that a block of queries reads."""
        if not self.causal:
            return 0, self.count - 1
        return jnp.maximum(i * self.size - window + 1, 0) // self.size, i

    def queries_of(self, j: Any, window: Any) -> tuple[Any, Any]:
        """The first and the last block of queries that read a block of keys."""
        if not self.causal:
            return 0, self.count - 1
        last = (j * self.size + self.size - 1 + window - 1) // self.size
        return j, jnp.minimum(last, self.count - 1)

    def visible(self, i: Any, j: Any, window: Any) -> tuple[Any, Any]:
        """Whether any score of a block is to be computed, and whether all of them are."""
        first, last = self.keys_of(i, window)
        some = (first <= j) & (j <= last)
        if not self.causal:
            return some, (j + 1) * self.size <= self.valid
        return some, (j < i) & ((i - j + 1) * self.size <= window)


def aligned(width: int) -> bool:
    """Whether heads of that width fill whole rows of lanes, and are `stored` side by side."""
    return width % LANES == 0


def stored(heads: Float[Array, "B T H K"]) -> Float[Array, "..."]:
    """Heads as kernels read them from memory: nothing between them and the products around.

    A linear map writes a position's heads side by side, and reads them so. Where a head fills whole
    rows of lanes, a kernel takes its columns of that: [B, T, H K]. Any other head has to be a
    matrix of its own: [B, H, T, K].
    """
    if aligned(heads.shape[-1]):
        return heads.reshape(*heads.shape[:2], -1)
    return heads.swapaxes(1, 2)


def unstored(stored: Float[Array, "..."], width: int) -> Float[Array, "B T H K"]:
    """The heads of some width that are `stored` so."""
    if aligned(width):
        return stored.reshape(*stored.shape[:2], -1, width)
    return stored.swapaxes(1, 2)
