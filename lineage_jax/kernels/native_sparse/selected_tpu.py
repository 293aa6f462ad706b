"""The selected branch on a TPU: each query's blocks are read from memory on the chip.

A block of keys is a small matrix, and the heads of one group are its few rows of queries. All
blocks of one key-value head stay on the chip while its queries come by, if they fit; if not, those
of a query are fetched while the one before is computed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import LANES, MASKED
from lineage_jax.kernels.flash_tpu import product
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.blockwise import in_blocks
from lineage_jax.kernels.native_sparse.chip_tpu import (
    LEAST,
    TILE,
    by_group,
    compiler_params,
    matrix_width,
    on_chip,
    padded_bytes,
    spans,
    whole_tiles,
)
from lineage_jax.kernels.native_sparse.config import NSAConfig
from lineage_jax.typing import Array, Float, Int

UNROLL = {128: 2, 256: 4}
"""Queries whose instructions the compiler mixes, by the width of matrix units: while products of
one are waited for, another computes. With twice as many, registers do not suffice."""
TOGETHER = 2048
"""Keys of a query at most whose scores are there at once; more come in turn."""
STRIP = 16
"""Queries of which it is found out at once what is hidden from them."""
SPARE_BYTES = 10 * 2**20
"""Of memory on the chip, for all but the keys and values that stay there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one call.

    Attributes:
      batch, length, groups, share, width: of queries [B, T, G, R, K], in whole tiles.
      value_width: E.
      count, size: of blocks of keys, [B, G, J, P, K].
      each: blocks that a query selects.
      dtype: of all.
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

    @property
    def chunk(self) -> int:
        """Blocks that meet a query in one product."""
        return min(self.each, max(1, matrix_width() // self.size))

    @property
    def together(self) -> int:
        """Blocks whose scores are there at once, in whole chunks."""
        most = max(1, min(TOGETHER // self.size, self.each))
        return -(-most // self.chunk) * self.chunk

    @property
    def parts(self) -> int:
        """How often that is, for a query."""
        return -(-self.each // self.together)

    @property
    def slots(self) -> int:
        """Blocks that a query is given, some of which may be none."""
        return self.parts * self.together

    @property
    def stored_widths(self) -> list[int]:
        """Of keys and of values as they are stored."""
        return [-(-width // LANES) * LANES for width in (self.width, self.value_width)]

    @property
    def resident(self) -> bool:
        """Whether all keys and values of one head fit on the chip."""
        rows = (self.count + 1) * self.size
        stored = sum(padded_bytes(rows, width, self.dtype) for width in self.stored_widths)
        return stored <= on_chip() - SPARE_BYTES

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
    )


def told(
    blocks: Int[Array, "B T G N"], reach: Intervals, length: int, sizes: Sizes
) -> tuple[Int[Array, "B G tiles 1 slots"], Int[Array, "B G S told"]]:
    """The blocks of each query as scalars; and with its reach, as a row.

    A block that is none is the one after the last, whose keys are zeros and nobody's.
    """
    none = ((0, 0), (0, 0), (0, 0), (0, sizes.slots - sizes.each))
    blocks = jnp.pad(whole_tiles(blocks, -1), none, constant_values=-1).swapaxes(1, 2)
    blocks = jnp.where(blocks < 0, sizes.count, blocks)  # B G S slots
    ends = [x[:, None, :, None] for x in spans(reach, length)]
    ends = [jnp.broadcast_to(x, (*blocks.shape[:3], 1)) for x in ends]
    scalars = blocks.reshape(sizes.batch, sizes.groups, -1, 1, TILE * sizes.slots)
    return scalars, jnp.concatenate([*ends, blocks], -1)


def stored(heads: Float[Array, "B S G K"], sizes: Sizes) -> Float[Array, "B G blocks P lanes"]:
    """Blocks of keys or values, and one of zeros; in whole rows of lanes, which need no mask."""
    blocks = in_blocks(heads, sizes.size)
    lanes = -heads.shape[-1] % LANES
    return jnp.pad(blocks, ((0, 0), (0, 0), (0, 1), (0, 0), (0, lanes)))


def padded(heads: Any) -> Any:
    """The heads of a query in whole rows of lanes."""
    lanes = -heads.shape[-1] % LANES
    if not lanes:
        return heads
    return jnp.concatenate([heads, jnp.zeros((heads.shape[0], lanes), heads.dtype)], 1)


def selected_forward(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    blocks: Int[Array, "B T G N"],
    config: NSAConfig,
    reach: Intervals,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """As `reference.selected_attention`, and the logarithm of the sum under each softmax, float32.

    That of a query that reads nothing is MASKED.
    """
    s = sizes(query, keys, values, blocks, config)
    scale = math.log2(math.e) / math.sqrt(s.width)  # for powers of two, which are what a TPU has

    def meet(heads, hidden, chunks, old):
        """What a query knows, its largest score, sum and attended values, of some more blocks."""
        scores = [product(heads, keys, (1, 1)) * scale for keys, _ in chunks]  # R keys
        scores = [x + hide for x, hide in zip(scores, hidden, strict=True)]
        largest = functools.reduce(jnp.maximum, scores).max(1, keepdims=True)
        largest = jnp.maximum(largest, old[0] if old else LEAST)
        weights = [jnp.exp2(x - largest) for x in scores]
        total = sum(weights).sum(1, keepdims=True)
        attended = sum(
            product(x.astype(s.dtype), values, (1, 0))
            for x, (_, values) in zip(weights, chunks, strict=True)
        )
        if not old:
            return largest, total, attended
        keep = jnp.exp2(old[0] - largest)
        return largest, old[1] * keep + total, old[2] * keep + attended

    def kernel(blocks_ref, told_ref, query_ref, keys_ref, values_ref, *refs):
        out_ref, log_ref, hidden_ref, *buffers = refs
        arrive, read = fetched(s, blocks_ref, keys_ref, values_ref, *buffers)
        hide(s, told_ref, hidden_ref)

        def one(t):
            def part(i, old):
                step = t * s.parts + i
                arrive(step)
                chunks = [read(step, at) for at in range(0, s.together, s.chunk)]
                return meet(padded(query_ref[t]), hidden_keys(s, hidden_ref, t, i), chunks, old)

            if s.parts == 1:
                largest, total, attended = part(0, None)
            else:
                start = jnp.full((s.share, 1), LEAST), jnp.zeros((s.share, 1))
                start = *start, jnp.zeros((s.share, s.stored_widths[1]))
                largest, total, attended = jax.lax.fori_loop(0, s.parts, part, start)
            some, attended = total > 0, attended[:, : s.value_width]
            out_ref[t] = (attended / jnp.where(some, total, 1)).astype(out_ref.dtype)
            return jnp.where(some, largest * math.log(2) + jnp.log(total), MASKED)

        unroll = UNROLL[matrix_width()]

        def several(i, _):
            logs = log_ref[...]
            at = jax.lax.broadcasted_iota(jnp.int32, logs.shape, 1)
            for t in (i * unroll + n for n in range(unroll)):
                logs = jnp.where(at == t, one(t), logs)
            log_ref[...] = logs

        jax.lax.fori_loop(0, TILE // unroll, several, None)

    out, log_sum = pl.pallas_call(
        kernel,
        grid=(s.batch, s.groups, s.length // TILE),
        in_specs=[*told_specs(s), heads_spec(s, s.width), *stored_specs(s)],
        out_specs=[
            heads_spec(s, s.value_width),
            pl.BlockSpec((None, None, s.share, TILE), lambda b, g, i: (b, g, 0, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((s.batch, s.length, s.groups, s.share, s.value_width), s.dtype),
            jax.ShapeDtypeStruct((s.batch, s.groups, s.share, s.length), jnp.float32),
        ],
        scratch_shapes=buffers(s),
        compiler_params=compiler_params(2, 1),
        cost_estimate=s.cost(s.width + s.value_width, passes=1),
        name="selected_forward",
        interpret=interpret,
    )(
        *told(blocks, reach, keys.shape[1], s),
        by_group(query, s.groups),
        stored(keys, s),
        stored(values, s),
    )
    return ungrouped(out, query.shape[1]), of_heads(log_sum, query.shape[1])


def ungrouped(heads: Float[Array, "B S G R K"], length: int) -> Float[Array, "B T H K"]:
    """Query heads of the first positions, side by side."""
    return heads.reshape(*heads.shape[:2], -1, heads.shape[-1])[:, :length]


def of_heads(sums: Float[Array, "B G R S"], length: int) -> Float[Array, "B H T"]:
    """Numbers of each query head, at the first positions."""
    return sums.reshape(sums.shape[0], -1, sums.shape[-1])[..., :length]


def told_specs(sizes: Sizes) -> list[pl.BlockSpec]:
    """What is told of a tile of queries, as scalars and as rows."""
    shape = (None, None, None, 1, TILE * sizes.slots)
    scalars = pl.BlockSpec(shape, lambda b, g, i: (b, g, i, 0, 0), memory_space=pltpu.SMEM)
    rows = pl.BlockSpec((None, None, TILE, 2 + sizes.slots), lambda b, g, i: (b, g, i, 0))
    return [scalars, rows]


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
            (None, None, sizes.count + 1, sizes.size, width),
            lambda b, g, i: (b, g, 0, 0, 0),
            pipeline_mode=pl.Buffered(1),
        )
        for width in sizes.stored_widths
    ]


def buffers(sizes: Sizes) -> list[Any]:
    """Memory for what is hidden of a tile; and for two queries' blocks, if not all are there."""
    hidden = pltpu.VMEM((sizes.parts, TILE, 1, sizes.together * sizes.size), jnp.float32)
    if sizes.resident:
        return [hidden]
    return [
        hidden,
        *(
            pltpu.VMEM((2, sizes.together, sizes.size, width), sizes.dtype)
            for width in sizes.stored_widths
        ),
        pltpu.SemaphoreType.DMA((2, 2)),
    ]


def hide(sizes: Sizes, told_ref: Any, hidden_ref: Any) -> None:
    """Leaves 0 for each key of each query's blocks that it reads, and MASKED for others.

    A product gives each of a block's keys the block's number, exactly: in two pieces of 8 bits.
    """
    s, keys = sizes, sizes.together * sizes.size
    slot = jax.lax.broadcasted_iota(jnp.int32, (s.together, keys), 0) * s.size
    lane = jax.lax.broadcasted_iota(jnp.int32, (s.together, keys), 1)
    spread = ((lane >= slot) & (lane < slot + s.size)).astype(jnp.bfloat16)
    place = jax.lax.broadcasted_iota(jnp.int32, (STRIP, s.together), 1)

    def strip(i, _):
        rows = pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP)
        first, span = told_ref[rows, :1], told_ref[rows, 1:2].astype(jnp.uint32)
        for part in range(s.parts):
            begin = 2 + part * s.together
            blocks = told_ref[rows, begin : begin + s.together] - place  # so that lanes count on
            pieces = [jax.lax.shift_right_arithmetic(blocks, 8), blocks & 255]
            high, low = (product(x.astype(jnp.bfloat16), spread, (1, 0)) for x in pieces)
            key = (high * 256 + low).astype(jnp.int32) * s.size
            key += jax.lax.broadcasted_iota(jnp.int32, key.shape, 1)
            seen = (key - first).astype(jnp.uint32) <= span
            hidden = jnp.where(seen, 0.0, MASKED)
            for n in range(STRIP):
                hidden_ref[part, i * STRIP + n] = hidden[n : n + 1]

    jax.lax.fori_loop(0, TILE // STRIP, strip, None)


def hidden_keys(sizes: Sizes, hidden_ref: Any, t: Any, part: Any) -> list[Any]:
    """What to add to the scores of a query, [1, keys], chunk by chunk of a part of its blocks."""
    width = sizes.chunk * sizes.size
    return [
        hidden_ref[part, t, :, pl.ds(at * width, width)]
        for at in range(sizes.together // sizes.chunk)
    ]


def fetched(
    sizes: Sizes, blocks_ref: Any, keys_ref: Any, values_ref: Any, *buffers: Any
) -> tuple[Callable[[Any], None], Callable[[Any, int], tuple[Any, Any]]]:
    """How to come by the blocks of a step: of a part of the blocks of a query, in order.

    Returns:
      A function to be called before each step, from the first one of a tile to the last.
      One that gives keys and values of a chunk of a step's blocks, or of the step's before.
    """
    s = sizes
    if s.resident:

        def look_up(step, at):
            slots = range(at, at + s.chunk)
            blocks = [blocks_ref[0, step * s.together + slot] for slot in slots]
            return tuple(joined([ref[n] for n in blocks]) for ref in (keys_ref, values_ref))

        return lambda step: None, look_up

    *stores, semaphores = buffers
    row, group, steps = pl.program_id(0), pl.program_id(1), TILE * s.parts

    def start(step):
        side = jax.lax.rem(step, 2)
        for n in range(s.together):
            block = blocks_ref[0, step * s.together + n]
            for i, (ref, store) in enumerate(zip((keys_ref, values_ref), stores, strict=True)):
                copy = (ref.at[row, group, block], store.at[side, n], semaphores.at[i, side])
                pltpu.make_async_copy(*copy).start()

    def arrive(step):
        side = jax.lax.rem(step, 2)
        pl.when(step == 0)(lambda: start(step))
        pl.when(step + 1 < steps)(lambda: start(step + 1))
        for i, store in enumerate(stores):
            pltpu.make_async_copy(store.at[side], store.at[side], semaphores.at[i, side]).wait()

    def read(step, at):
        side = jax.lax.rem(step, 2)
        return tuple(joined([store[side, at + n] for n in range(s.chunk)]) for store in stores)

    return arrive, read


def joined(blocks: Sequence[Any]) -> Any:
    """Rows of blocks below one another."""
    return jnp.concatenate(blocks) if len(blocks) > 1 else blocks[0]
