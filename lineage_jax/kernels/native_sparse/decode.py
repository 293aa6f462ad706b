"""Native Sparse Attention a token at a time, from a cache of static shape."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.api import attend, chosen
from lineage_jax.kernels.native_sparse.chip_tpu import TILE
from lineage_jax.kernels.native_sparse.config import PAPER, Branches, NSAConfig
from lineage_jax.typing import Array, Bool, DTypeLike, Float, Int

Squeeze = Callable[[Float[Array, "... P K"]], Float[Array, "... K"]]


class NSACache(NamedTuple):
    """Keys and values of the positions read so far.

    Attributes:
      keys, values: of each branch: slot s of the selected and the window's holds position s, slot c
        of the compressed ones the block that begins at position c * stride, once it is whole.
      pending_keys, pending_values: what the next compressed key and value will be made of: those of
        the last positions, position p in slot p % compressed_size.
    """

    keys: Branches
    values: Branches
    pending_keys: Float[Array, "*L B P G K"]
    pending_values: Float[Array, "*L B P G E"]

    @property
    def length(self) -> int:
        """Positions that it has room for."""
        return self.keys.selected.shape[-3]

    def write(
        self,
        positions: Int[Array, "B T"],
        keys: Branches,
        values: Branches,
        squeeze: tuple[Squeeze, Squeeze],
        config: NSAConfig,
        mask: Bool[Array, "B T"] | None = None,
    ) -> "NSACache":
        """The cache with new keys and values, as `nsa_decode` takes them, at their positions."""
        rows = jnp.arange(positions.shape[0])[:, None]

        def written(old, pending, new, squeeze):
            whole = compressed(old.compressed, pending, new.compressed, positions, squeeze, config)
            rest = [
                x.at[rows, positions].set(y.astype(x.dtype))
                for x, y in zip(old[1:], new[1:], strict=True)
            ]
            return Branches(whole, *rest), kept(pending, new.compressed, positions, mask)

        of_keys = written(self.keys, self.pending_keys, keys, squeeze[0])
        of_values = written(self.values, self.pending_values, values, squeeze[1])
        return NSACache(of_keys[0], of_values[0], of_keys[1], of_values[1])


def empty_nsa_cache(
    batch: int,
    length: int,
    num_groups: int,
    key_width: int,
    value_width: int,
    dtype: DTypeLike,
    config: NSAConfig = PAPER,
) -> NSACache:
    """Room for `length` positions of `batch` sequences."""
    lengths = Branches(config.num_compressed(length), length, length)

    def zeros(count, width):
        return jnp.zeros((batch, count, num_groups, width), dtype)

    keys, values = (
        Branches(*(zeros(n, width) for n in lengths)) for width in (key_width, value_width)
    )
    pending = (zeros(config.compressed_size, width) for width in (key_width, value_width))
    return NSACache(keys, values, *pending)


def nsa_decode(
    query: Float[Array, "B T H K"],
    keys: Branches,
    values: Branches,
    gates: Float[Array, "B T H 3"],
    cache: NSACache,
    positions: Int[Array, "B T"],
    squeeze: tuple[Squeeze, Squeeze],
    *,
    config: NSAConfig = PAPER,
    mask: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H E"], NSACache]:
    """`native_sparse_attention` of the next positions of each row, and the cache with them in it.

    Args:
      query: projected heads, of one position a row or of several: a prompt, or a piece of one.
      keys, values: the new ones of each branch, [B, T, G, K] and [B, T, G, E], of which those of
        the compressed branch are not compressed yet.
      gates: of each query head, for the branches in their order.
      cache: what was read before (`empty_nsa_cache`).
      positions: where they stand, each row's one after another.
      squeeze: makes one key, and one value, of those of a block, as in `compress`.
      config: sizes.
      mask: False for padding, which stands on the right of a prompt: tokens that follow write over
        it before they read.
      implementation: as of `native_sparse_attention`; if not given, kernels only for as many
        positions as fill their tiles.
    """
    if implementation is None and query.shape[1] < TILE:
        implementation = "xla"
    cache = cache.write(positions, keys, values, squeeze, config, mask)
    reads = Intervals(jnp.zeros_like(positions), positions)
    stored = jax.tree.map(lambda x: x.astype(query.dtype), cache)
    parts = chosen(implementation)
    return attend(query, stored.keys, stored.values, gates, config, reads, parts), cache


def compressed(
    old: Float[Array, "B C G K"],
    pending: Float[Array, "B P G K"],
    new: Float[Array, "B T G K"],
    positions: Int[Array, "B T"],
    squeeze: Squeeze,
    config: NSAConfig,
) -> Float[Array, "B C G K"]:
    """Compressed heads with those of the blocks that the new positions make whole."""
    size, stride = config.compressed_size, config.stride
    rows, start, length = jnp.arange(new.shape[0])[:, None], positions[:, :1], new.shape[1]
    before = pending[rows, (start + jnp.arange(size)[None]) % size]  # those from start - size on
    line = jnp.concatenate([before, new.astype(pending.dtype)], axis=1)
    first = -((size - 1 - start) // stride)  # whose last position is the first at or after start
    blocks = first + jnp.arange((length - 1) // stride + 1)[None]  # B n
    whole = (blocks >= 0) & (blocks * stride + size <= start + length)

    def written():
        at = (blocks * stride - start + size)[..., None] + jnp.arange(size)[None, None]
        pieces = line[rows[..., None], at].swapaxes(2, 3)  # B n G P K
        places = jnp.where(whole, blocks, old.shape[1])
        return old.at[rows, places].set(squeeze(pieces).astype(old.dtype), mode="drop")

    if length > 1:
        return written()
    return jax.lax.cond(whole.any(), written, lambda: old)


def kept(
    pending: Float[Array, "B P G K"],
    new: Float[Array, "B T G K"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None,
) -> Float[Array, "B P G K"]:
    """Heads of the last positions that are no padding."""
    size = pending.shape[1]
    count = new.shape[1] if mask is None else mask.sum(1, keepdims=True)
    end = positions[:, :1] + count
    last = (positions >= end - size) & (positions < end)
    places = jnp.where(last, positions % size, size)
    rows = jnp.arange(new.shape[0])[:, None]
    return pending.at[rows, places].set(new.astype(pending.dtype), mode="drop")
