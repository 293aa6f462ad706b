"""What the selected branch's kernels for TPU read, and how the blocks of a query come.

All blocks of one key-value head stay on the chip while its queries come by, if they fit; if not,
those of a query are fetched while the one before is computed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import LANES, MASKED
from lineage_jax.kernels.flash_tpu import product
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.chip_tpu import (
    TILE,
    matrix_width,
    on_chip,
    padded_bytes,
    spans,
    whole_tiles,
)
from lineage_jax.kernels.native_sparse.config import NSAConfig
from lineage_jax.kernels.native_sparse.packed_tpu import Packed, packed
from lineage_jax.typing import Array, Int

PIECE = {128: 1024, 256: 256}
"""Keys of a query whose scores are turned into weights at once, by the width of matrix units: with
those of the other width, registers do not suffice."""
TOGETHER = 2048
"""Keys of a query at most whose scores are there at once; more come in turn."""
STRIP = 16
"""Queries whose scores are there at once."""
SPARE_BYTES = 10 * 2**20
"""Of memory on the chip, for all but scores and the keys and values that stay there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one call.

    Attributes:
      batch, length, groups, share, width: of queries [B, T, G, R, K], in whole tiles.
      value_width: E.
      count, size: of blocks of keys, [B, G, J, P, K].
      each: blocks that a query selects.
      dtype: of all.
      across: columns that a product with keys, and one with values, takes at once.
    """

    batch: int
    length: int
    groups: int
    share: int
    width: int
    value_width: int
    count: int
    size: int
    each: int
    dtype: Any
    across: tuple[int, int]

    @property
    def keys(self) -> Packed:
        """How keys are stored."""
        return self.stored[0]

    @property
    def values(self) -> Packed:
        """How values are stored."""
        return self.stored[1]

    @property
    def stored(self) -> list[Packed]:
        """Keys and values."""
        return packed((self.width, self.value_width), self.across, self.size, self.dtype)

    @property
    def chunk(self) -> int:
        """Blocks that meet a query in one product: as many as fill matrix units.

        Where keys are packed, each of the parts that have rows does.
        """
        most = min(self.each, max(1, matrix_width() * self.keys.cuts // self.size))
        return -(-self.each // -(-self.each // most))

    @property
    def together(self) -> int:
        """Blocks whose scores are there at once, in whole chunks."""
        most = max(1, min(TOGETHER // self.size, self.each))
        return -(-most // self.chunk) * self.chunk

    @property
    def chunks(self) -> list[tuple[int, slice]]:
        """The first block and the keys of each chunk of those."""
        width = self.chunk * self.size
        return [
            (n * self.chunk, slice(n * width, (n + 1) * width))
            for n in range(self.together // self.chunk)
        ]

    @property
    def pieces(self) -> list[slice]:
        """Those keys in equal pieces, for what is done with scores."""
        keys, width = self.together * self.size, PIECE[matrix_width()]
        if keys % width:
            width = self.chunk * self.size
        return [slice(begin, begin + width) for begin in range(0, keys, width)]

    @property
    def parts(self) -> int:
        """How often that is, for a query."""
        return -(-self.each // self.together)

    @property
    def slots(self) -> int:
        """Blocks that a query is given, some of which may be none."""
        return self.parts * self.together

    @property
    def resident(self) -> bool:
        """Whether all keys and values of one head fit on the chip, beside two tables of scores."""
        stored = (self.count + 1) * sum(stored.rows for stored in self.stored)
        scores = 2 * STRIP * padded_bytes(self.share, self.slots * self.size, jnp.float32)
        return padded_bytes(stored, LANES, self.dtype) + scores <= on_chip() - SPARE_BYTES

    def cost(self, products: int, passes: int) -> pl.CostEstimate:
        """What a kernel takes that meets the blocks of every query.

        Args:
          products: widths of its products together; each score is in all of them.
          passes: how often queries, and as much of their values, are read or written.
        """
        queries, keys = self.batch * self.length * self.groups, self.each * self.size
        scores, stored = queries * self.share * keys, self.batch * self.groups * self.count
        read = stored * self.size if self.resident else queries * keys
        moved = (passes * queries * self.share + read) * (self.width + self.value_width)
        return pl.CostEstimate(
            flops=2 * scores * products,
            transcendentals=scores,
            bytes_accessed=moved * jnp.dtype(self.dtype).itemsize,
        )


def sizes(query: Array, keys: Array, values: Array, blocks: Array, config: NSAConfig) -> Sizes:
    """Of arrays as `selected_forward` takes them."""
    batch, length, num_heads, width = query.shape
    groups = keys.shape[2]
    return Sizes(
        batch=batch,
        length=-(-length // TILE) * TILE,
        groups=groups,
        share=num_heads // groups,
        width=width,
        value_width=values.shape[-1],
        count=config.num_selectable(keys.shape[1]),
        size=config.block_size,
        each=blocks.shape[-1],
        dtype=query.dtype,
        across=(matrix_width(), LANES),
    )


def told(
    blocks: Int[Array, "B T G N"], reach: Intervals, length: int, sizes: Sizes
) -> tuple[Int[Array, "B G tiles 1 slots"], Int[Array, "B G S told"], Int[Array, "2 keys"]]:
    """The blocks of each query as scalars; with its reach, as a row; and the order of keys.

    A block that is none is the one after the last, whose keys are zeros and nobody's. The order is
    that of the keys of a part of a query's blocks: which of these each is of, and where in it.
    """
    s = sizes
    none = ((0, 0), (0, 0), (0, 0), (0, s.slots - s.each))
    blocks = jnp.pad(whole_tiles(blocks, -1), none, constant_values=-1).swapaxes(1, 2)
    blocks = jnp.where(blocks < 0, s.count, blocks)  # B G S slots
    ends = [x[:, None, :, None] for x in spans(reach, length)]
    ends = [jnp.broadcast_to(x, (*blocks.shape[:3], 1)) for x in ends]
    scalars = blocks.reshape(s.batch, s.groups, -1, 1, TILE * s.slots)
    slot, key = s.keys.order(s.chunk)
    slots = [slot + begin for begin in range(0, s.together, s.chunk)]
    order = np.stack([np.concatenate(slots), np.tile(key, len(slots))]).astype(np.int32)
    return scalars, jnp.concatenate([*ends, blocks], -1), jnp.asarray(order)


def told_specs(sizes: Sizes) -> list[pl.BlockSpec]:
    """What is told of a tile of queries, as scalars and as rows; and the order of keys."""
    shape = (None, None, None, 1, TILE * sizes.slots)
    scalars = pl.BlockSpec(shape, lambda b, g, i: (b, g, i, 0, 0), memory_space=pltpu.SMEM)
    rows = pl.BlockSpec((None, None, TILE, 2 + sizes.slots), lambda b, g, i: (b, g, i, 0))
    order = pl.BlockSpec((2, sizes.together * sizes.size), lambda b, g, i: (0, 0))
    return [scalars, rows, order]


def heads_spec(sizes: Sizes, width: int) -> pl.BlockSpec:
    """The heads of one group, of a tile of queries."""
    shape = (None, TILE, None, sizes.share, width)
    return pl.BlockSpec(shape, lambda b, g, i: (b, i, g, 0, 0))


def stored_specs(sizes: Sizes) -> list[pl.BlockSpec]:
    """Keys and values of one head, on the chip; or of all, where they are."""
    if not sizes.resident:
        return [pl.BlockSpec(memory_space=pl.ANY)] * 2
    return [
        pl.BlockSpec(
            (None, None, sizes.count + 1, stored.rows, LANES),
            lambda b, g, i: (b, g, 0, 0, 0),
            pipeline_mode=pl.Buffered(1),
        )
        for stored in sizes.stored
    ]


def buffers(sizes: Sizes, *stored: Packed) -> list[Any]:
    """Memory for the blocks of two steps, of each of those, if they are not all there."""
    if sizes.resident:
        return []
    found = list[Any]()
    for one in stored:
        found.append(pltpu.VMEM((2, sizes.together, one.rows, LANES), sizes.dtype))
        found.append(pltpu.SemaphoreType.DMA((2,)))
    return found


def hidden_buffer(sizes: Sizes) -> Any:
    """Memory for what is hidden of a strip."""
    return pltpu.VMEM((sizes.parts, STRIP, 1, sizes.together * sizes.size), jnp.float32)


def hide(sizes: Sizes, first: Any, told_ref: Any, order_ref: Any, hidden_ref: Any) -> None:
    """Leaves 0 for each key of a strip's queries' blocks that it reads, and MASKED for others.

    A product gives each of a block's keys the block's number, exactly: in two pieces of 8 bits.
    """
    s, slot, place = sizes, order_ref[:1], order_ref[1:]
    slots = jax.lax.broadcasted_iota(jnp.int32, (s.together, slot.shape[1]), 0)
    spread = (slots == slot).astype(jnp.bfloat16)
    rows = pl.ds(pl.multiple_of(first, STRIP), STRIP)
    begin, span = told_ref[rows, :1], told_ref[rows, 1:2].astype(jnp.uint32)
    for part in range(s.parts):
        blocks = told_ref[rows, pl.ds(2 + part * s.together, s.together)]
        pieces = [jax.lax.shift_right_arithmetic(blocks, 8), blocks & 255]
        high, low = (product(x.astype(jnp.bfloat16), spread, (1, 0)) for x in pieces)
        key = (high * 256 + low).astype(jnp.int32) * s.size + place
        seen = (key - begin).astype(jnp.uint32) <= span
        hidden = jnp.where(seen, 0.0, MASKED)
        for n in range(STRIP):
            hidden_ref[part, n] = hidden[n : n + 1]


def fetched(
    sizes: Sizes, blocks_ref: Any, ref: Any, *buffers: Any
) -> tuple[Callable[[Any], None], Callable[[Any, int], list[Any]]]:
    """How to come by the blocks of a step: of a part of the blocks of a query, in order.

    Args:
      sizes: of the call.
      blocks_ref: their numbers.
      ref: of the keys, or the values, of one head; or of all, with `buffers` for two steps.

    Returns:
      A function to be called before each step, from the first one of a tile to the last.
      One that gives a chunk of a step's blocks.
    """
    s = sizes
    if s.resident:

        def look_up(step, at):
            slots = range(at, at + s.chunk)
            return [ref.at[blocks_ref[0, step * s.together + slot]] for slot in slots]

        return lambda step: None, look_up

    store, semaphores = buffers
    row, group, steps = pl.program_id(0), pl.program_id(1), TILE * s.parts

    def start(step):
        side = jax.lax.rem(step, 2)
        for n in range(s.together):
            block = blocks_ref[0, step * s.together + n]
            copy = ref.at[row, group, block], store.at[side, n], semaphores.at[side]
            pltpu.make_async_copy(*copy).start()

    def arrive(step):
        side = jax.lax.rem(step, 2)
        pl.when(step == 0)(lambda: start(step))
        pl.when(step + 1 < steps)(lambda: start(step + 1))
        pltpu.make_async_copy(store.at[side], store.at[side], semaphores.at[side]).wait()

    def read(step, at):
        side = jax.lax.rem(step, 2)
        return [store.at[side, at + n] for n in range(s.chunk)]

    return arrive, read
