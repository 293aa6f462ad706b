"""How a table of scores is cut into blocks, and which of them anybody reads."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from lineage_jax.typing import Array, Float, Int

LANES = 128
"""Numbers in a row of a TPU's vector registers."""

CHUNK_BYTES = 8 * 2**20
"""Of a float32 gradient of queries that stays on the chip: half of the 16 MiB of a TPU v4."""


class Spans(NamedTuple):
    """Which blocks of a row's positions read which, beyond what every row has in common.

    Documents lie side by side, so the blocks that share one with a block are neighbours. Arrays
    (inside a kernel, references to them) have an entry for each block of each row, row by row.

    Attributes:
      window: an array of one number: how many keys a query reads at most.
      begin, end: the first and the last block that share a document with this one.
      single: the first block from which on, up to the end of this one, all is one document; the
        next one, if this block is of several.
    """

    window: Any
    begin: Any
    end: Any
    single: Any


def spans(documents: Int[Array, "B T"], size: int, window: Int[Array, "1"]) -> Spans:
    """The spans of documents that are numbered in the order they come in."""
    blocks = documents.reshape(documents.shape[0], -1, size)
    first, last = blocks[:, :, 0], blocks[:, :, -1]  # B N
    begin = (last[:, None] < first[:, :, None]).sum(-1)
    end = (first[:, None] <= last[:, :, None]).sum(-1) - 1
    single = (first[:, None] < last[:, :, None]).sum(-1)
    return Spans(window, *(x.astype(jnp.int32).ravel() for x in (begin, end, single)))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The shape of one call, and how it is cut.

    Attributes:
      batch, heads, groups, length, width: of queries [B, T, H, K] and keys [B, T, G, K].
      size: queries, and keys, in a block.
      causal: whether a query reads only keys that are not after it.
    """

    batch: int
    heads: int
    groups: int
    length: int
    width: int
    size: int
    causal: bool

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
        """Blocks of scores that are computed, of one head, if each row is one document."""
        return self.count * (self.count + 1) // 2 if self.causal else self.count**2

    @property
    def masked(self) -> float:
        """The share of these in which some score is hidden: a causal mask's diagonal."""
        return self.count / self.pairs if self.causal else 0.0

    def keys_of(self, spans: Spans, row: Any, i: Any) -> tuple[Any, Any]:
        """The first and the last block of keys that a block of queries reads."""
        first, last = (x[row * self.count + i] for x in (spans.begin, spans.end))
        if not self.causal:
            return first, last
        in_window = jnp.maximum(i * self.size - spans.window[0] + 1, 0) // self.size
        return jnp.maximum(first, in_window), i

    def queries_of(self, spans: Spans, row: Any, j: Any) -> tuple[Any, Any]:
        """The first and the last block of queries that read a block of keys."""
        first, last = (x[row * self.count + j] for x in (spans.begin, spans.end))
        if not self.causal:
            return first, last
        in_window = (j * self.size + self.size - 1 + spans.window[0] - 1) // self.size
        return j, jnp.minimum(last, in_window)

    def visible(self, spans: Spans, row: Any, i: Any, j: Any) -> tuple[Any, Any]:
        """Whether any score of a block is to be computed, and whether none of it is hidden."""
        first, last = self.keys_of(spans, row, i)
        some = (first <= j) & (j <= last)
        whole = spans.single[row * self.count + jnp.maximum(i, j)] <= jnp.minimum(i, j)
        if self.causal:
            whole &= (j < i) & ((i - j + 1) * self.size <= spans.window[0])
        return some, whole


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
