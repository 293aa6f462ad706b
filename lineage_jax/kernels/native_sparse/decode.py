"""Native Sparse Attention a token at a time, from a cache of static shape."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lineage_jax.kernels import flash
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.api import attend, chosen
from lineage_jax.kernels.native_sparse.chip_tpu import TILE
from lineage_jax.kernels.native_sparse.config import PAPER, Branches, NSAConfig
from lineage_jax.kernels.native_sparse.decode_gpu import decode_attention
from lineage_jax.kernels.platform import platform
from lineage_jax.typing import Array, Bool, DTypeLike, Float, Int

Squeeze = Callable[[Float[Array, "... P K"]], Float[Array, "... K"]]


class NSACache(NamedTuple):
    """Keys and values of the positions read so far.

    Those of one head are together, [*L, B, G, S, K]: so a token is written, and a block is read,
    where it is. With heads side by side a TPU copies the whole cache at every token.

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
        return self.keys.selected.shape[-2]

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

        def written(old, pending, new, squeeze):
            whole = compressed(old.compressed, pending, new.compressed, positions, squeeze, config)
            rest = [
                put(x, y.swapaxes(1, 2), positions[:, 0])
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
    """Room for `length` positions of `batch` sequences, and for the rest of the last block."""
    length = config.num_selectable(length) * config.block_size
    lengths = Branches(config.num_compressed(length), length, length)
    keys, values = (
        Branches(*(jnp.zeros((batch, num_groups, n, width), dtype) for n in lengths))
        for width in (key_width, value_width)
    )
    pending = (
        jnp.zeros((batch, config.compressed_size, num_groups, width), dtype)
        for width in (key_width, value_width)
    )
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
        positions as fill their tiles, and on a GPU for one.
    """
    one = query.shape[1] == 1
    if implementation is None and query.shape[1] < TILE and not (one and platform() == "gpu"):
        implementation = "xla"
    cache = cache.write(positions, keys, values, squeeze, config, mask)
    name = flash.chosen(implementation)
    if one and name in ("pallas_gpu", "pallas_gpu_interpreted"):
        given = query, cache.keys, cache.values, gates, positions, config
        return decode_attention(*given, interpret=name != "pallas_gpu"), cache
    reads = Intervals(jnp.zeros_like(positions), positions)
    size = min(cache.length, config.window + query.shape[1] - 1)
    begin = jnp.clip(positions[:, :1] - config.window + 1, 0, cache.length - size)  # B 1
    near = Intervals(jnp.zeros_like(positions), positions - begin)

    def read(stored):
        part = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, size, axis=1))
        stored = stored._replace(window=part(stored.window, begin[:, 0]))
        return Branches(*(x.swapaxes(1, 2).astype(query.dtype) for x in stored))

    stored = read(cache.keys), read(cache.values)
    parts = chosen(implementation)
    return attend(query, *stored, gates, config, reads, near, parts), cache


def put(
    stored: Float[Array, "B G S K"],
    new: Float[Array, "B G T K"],
    begin: Int[Array, "B"],
    valid: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B G S K"]:
    """`stored` with each row's `new` from a position of its own on, where valid and where it fits.

    Row by row, in place: scattered, all would be copied on a TPU.
    """
    batch, length, count = stored.shape[0], stored.shape[2], new.shape[2]
    at = jnp.clip(begin, 0, length - count)
    index = jnp.arange(count)[None] + (at - begin)[:, None]  # of what goes to each place
    fits = (index >= 0) & (index < count)
    index = jnp.clip(index, 0, count - 1)
    if valid is not None:
        fits &= jnp.take_along_axis(valid, index, axis=1)
    new = jnp.take_along_axis(new.astype(stored.dtype), index[:, None, :, None], axis=2)

    def row(b, stored):
        here = b, 0, at[b], 0
        old = jax.lax.dynamic_slice(stored, here, (1, *new.shape[1:]))
        mine = jax.lax.dynamic_slice_in_dim(new, b, 1)
        mine = jnp.where(fits[b][None, None, :, None], mine, old)
        return jax.lax.dynamic_update_slice(stored, mine, here)

    return jax.lax.fori_loop(0, batch, row, stored)


def compressed(
    old: Float[Array, "B G C K"],
    pending: Float[Array, "B P G K"],
    new: Float[Array, "B T G K"],
    positions: Int[Array, "B T"],
    squeeze: Squeeze,
    config: NSAConfig,
) -> Float[Array, "B G C K"]:
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
        return put(old, squeeze(pieces).swapaxes(1, 2), first[:, 0], whole)

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
