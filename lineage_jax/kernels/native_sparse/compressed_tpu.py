"""The compressed branch on a TPU, and the choice of blocks, which is made of its weights.

Scores are keys by queries: one key to a row, one query of one head to a lane. So the largest score
of a query, its sums, and the best of its blocks are found down the rows, the weights of several
heads are added lane by lane, and whatever there is one of for each query is a row.

Keys are in an order of their own: of the compressed keys that begin in a block, all first ones of
a chunk of blocks come first, then all second ones, and so on. Then what blocks are worth (equation
9) is a sum of whole groups of rows. The weights of all heads wait on the chip until the sum that
they are to be divided by is known, if they fit; if not, they are computed again.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import MASKED
from lineage_jax.kernels.flash_tpu import product
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.chip_tpu import (
    LEAST,
    NOWHERE,
    SUBLANES,
    TILE,
    compiler_params,
    matrix_width,
    on_chip,
    padded_bytes,
    spans,
    whole_tiles,
)
from lineage_jax.kernels.native_sparse.choice_tpu import choose, in_order
from lineage_jax.kernels.native_sparse.config import NSAConfig, compressed_reads
from lineage_jax.typing import Array, Float, Int

CHUNK = 256
"""Keys of a chunk, about: so many scores of 128 queries are half of all vector registers."""
HEADS = {128: 2, 256: 4}
"""Heads side by side in a product, at most, by the width of matrix units: enough to keep two busy.
"""
STRIP = 32
"""Rows that are added to one another, or compared, independently."""
SPARE_BYTES = 8 * 2**20
"""Of memory on the chip, for what is not accounted for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """How the compressed keys of one call are cut.

    Attributes:
      batch, length, groups, share, width: of queries [B, G, R, T, K], in whole tiles.
      value_width: E.
      valid: blocks of positions.
      phases: compressed keys that begin in a block.
      overlap: strides of positions that a compressed key stands for.
      blocks: of positions, in a chunk.
      dtype: of all.
    """

    batch: int
    length: int
    groups: int
    share: int
    width: int
    value_width: int
    valid: int
    phases: int
    overlap: int
    blocks: int
    dtype: Any

    @property
    def count(self) -> int:
        """Chunks."""
        return -(-self.valid // self.blocks)

    @property
    def keys(self) -> int:
        """Of one chunk."""
        return self.blocks * self.phases

    @property
    def heads(self) -> int:
        """Side by side in a product."""
        return max(n for n in range(1, HEADS[matrix_width()] + 1) if self.share % n == 0)

    @property
    def products(self) -> int:
        """Of one chunk with all heads of a group."""
        return self.share // self.heads

    @property
    def lanes(self) -> int:
        """Queries in a product, those of all its heads counted."""
        return self.heads * TILE

    @property
    def kept(self) -> bool:
        """Whether the weights of all heads fit on the chip."""
        keys = self.count * self.keys
        weights = padded_bytes(keys * self.products, self.lanes, jnp.float32)
        stored = padded_bytes(keys, self.width, self.dtype)
        stored += padded_bytes(self.count * self.value_width, self.keys, self.dtype)
        tiles = padded_bytes(self.share * TILE, self.width, self.dtype)
        tiles += 2 * padded_bytes(self.share * TILE, self.value_width, jnp.float32)
        return weights + 2 * (stored + tiles) <= on_chip() - SPARE_BYTES

    @property
    def shares(self) -> list[tuple[int, int]]:
        """Strides that the key of each phase shares with its own block, and with the next one."""
        ends = [phase + self.overlap - self.phases for phase in range(self.phases)]
        return [(self.overlap - max(0, end), max(0, end)) for end in ends]

    @property
    def cost(self) -> pl.CostEstimate:
        """What the kernel takes, of queries that read half of all keys."""
        queries, keys = self.batch * self.groups * self.share * self.length, self.count * self.keys
        scores, widths = queries * keys // 2, self.width + self.value_width
        moved = (queries + self.batch * self.groups * keys) * widths
        return pl.CostEstimate(
            flops=2 * scores * (widths if self.kept else widths + self.width),
            transcendentals=scores,
            bytes_accessed=moved * jnp.dtype(self.dtype).itemsize,
        )


def chunks(query: Array, keys: Array, values: Array, length: int, config: NSAConfig) -> Chunks:
    """Of arrays as `compressed_forward` takes them."""
    batch, queries, num_heads, width = query.shape
    phases, valid = config.block_size // config.stride, config.num_selectable(length)
    most = max(1, CHUNK // phases // SUBLANES) * SUBLANES
    return Chunks(
        batch=batch,
        length=-(-queries // TILE) * TILE,
        groups=keys.shape[2],
        share=num_heads // keys.shape[2],
        width=width,
        value_width=values.shape[-1],
        valid=valid,
        phases=phases,
        overlap=config.compressed_size // config.stride,
        blocks=min(most, -(-valid // SUBLANES) * SUBLANES),
        dtype=query.dtype,
    )


def in_chunks(heads: Float[Array, "B C G K"], chunks: Chunks) -> Float[Array, "B G chunks keys K"]:
    """Compressed keys or values in the order of the kernel, and zeros for those that lack."""
    c = chunks
    padding = c.count * c.keys - heads.shape[1]
    heads = jnp.pad(heads, ((0, 0), (0, padding), (0, 0), (0, 0)))
    heads = heads.reshape(c.batch, c.count, c.blocks, c.phases, c.groups, -1)
    heads = heads.transpose(0, 4, 1, 3, 2, 5)
    return heads.reshape(c.batch, c.groups, c.count, c.keys, -1)


def told(
    reach: Intervals, num_keys: int, config: NSAConfig, chunks: Chunks
) -> tuple[Int[Array, "4 tiles"], Int[Array, "B 4 T"]]:
    """What a tile of queries is told, and each of its queries.

    Returns:
      Of each tile, row by row: the first chunk that any of its queries reads, the one after the
      last, and the first and the one after the last of those that all of them read whole.
      Of each query: its first key and the distance to its last one, its document's first block, and
      its own.
    """
    key, span = spans(compressed_reads(reach, config), num_keys)
    begin, own = (whole_tiles(x // config.block_size, -1) for x in reach)
    rows = jnp.stack([key, span, begin, own], 1).astype(jnp.int32)

    def of_tiles(x):
        return x.reshape(chunks.batch, -1, TILE)

    some = of_tiles(own) >= 0
    low = jnp.where(some, of_tiles(begin), NOWHERE).min(-1) // chunks.blocks
    high = jnp.minimum(of_tiles(own).max(-1) // chunks.blocks + 1, chunks.count)
    whole_low = -(-of_tiles(key).max(-1) // chunks.keys)
    whole_high = (of_tiles(key + span).min(-1) + 1) // chunks.keys
    tiles = jnp.stack([low, high, whole_low, whole_high]).astype(jnp.int32)
    return tiles.reshape(4, -1), rows


def compressed_forward(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B C G K"],
    values: Float[Array, "B C G E"],
    length: int,
    config: NSAConfig,
    reach: Intervals,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"], Int[Array, "B T G N"]]:
    """As `reference.compressed_attention`, with the logarithm of the sum under each softmax.

    It is float32. That of a query that reads nothing is MASKED.
    """
    c, each = chunks(query, keys, values, length, config), config.num_blocks
    scale = math.log2(math.e) / math.sqrt(c.width)  # for powers of two, which are what a TPU has

    def kernel(tiles_ref, rows_ref, query_ref, keys_ref, values_ref, *refs):
        out_ref, log_ref, blocks_ref, largest_ref, sum_ref, total_ref, hide_ref, *rest = refs
        most_ref, even_ref, odd_ref, worth_ref, chosen_ref, *kept_refs = rest
        tile = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
        low, high, whole_low, whole_high = (tiles_ref[i, tile] for i in range(4))
        key, span, begin, own = (rows_ref[i : i + 1] for i in range(4))  # 1 queries
        largest_ref[...] = jnp.full_like(largest_ref, LEAST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)

        def scores(i, n, masked):
            heads = query_ref[pl.ds(n * c.heads, c.heads)].reshape(c.lanes, c.width)
            raw = product(keys_ref[i], heads, (1, 1)) * scale  # keys lanes
            return raw + beside([hide_ref[...]] * c.heads) if masked else raw

        def hide(i):
            row = jax.lax.broadcasted_iota(jnp.int32, (c.blocks, TILE), 0) + i * c.blocks
            for phase in range(c.phases):
                reads = (row * c.phases + phase - key).astype(jnp.uint32) <= span.astype(jnp.uint32)
                here = pl.ds(phase * c.blocks, c.blocks)
                hide_ref[here] = jnp.where(reads, 0.0, MASKED)

        def score(i, n, masked, raw_ref):
            """Leaves the scores of a chunk with some heads; gives the largest of each query."""
            raw = scores(i, n, masked)
            raw_ref[...] = raw
            return in_strips(jnp.maximum, raw).max(0, keepdims=True)

        def meet(i, n, raw_ref, most):
            """Adds what a chunk of keys gives to some heads, whose scores are there."""
            old = largest_ref[n]
            largest = jnp.maximum(old, most)
            weights, keep = jnp.exp2(raw_ref[...] - largest), jnp.exp2(old - largest)
            largest_ref[n] = largest
            sum_ref[n] = sum_ref[n] * keep + in_strips(jnp.add, weights).sum(0, keepdims=True)
            new = product(values_ref[i], weights.astype(c.dtype), (1, 0))  # E lanes
            total_ref[n] = total_ref[n] * keep + new
            if c.kept:
                weights_ref, at_ref = kept_refs
                weights_ref[i, n] = weights
                at_ref[i, n] = largest

        def over_heads(i, masked):
            """Meets a chunk, and leaves the scores of the next one's first heads, not masked."""
            last, after = c.products - 1, jnp.minimum(i + 1, high - 1)
            if masked:
                hide(i)
                most_ref[...] = score(i, 0, True, even_ref)

            def two(k, most):  # the scores of one are computed while another is met
                other = score(i, 2 * k + 1, masked, odd_ref)
                meet(i, 2 * k, even_ref, most)
                n = 2 * k + 2
                if masked:
                    most = score(i, jnp.minimum(n, last), True, even_ref)
                else:
                    at = jnp.where(n > last, after, i), jnp.where(n > last, 0, n)
                    most = score(*at, False, even_ref)
                meet(i, 2 * k + 1, odd_ref, other)
                return most

            most = jax.lax.fori_loop(0, c.products // 2, two, most_ref[...])
            if c.products % 2:
                meet(i, last, even_ref, most)
            if c.products % 2 or masked:
                most = score(after, 0, False, even_ref)
            most_ref[...] = most

        def chunk(i, _):
            whole = (whole_low <= i) & (i < whole_high)
            pl.when(whole)(lambda: over_heads(i, False))
            pl.when(jnp.logical_not(whole))(lambda: over_heads(i, True))

        @pl.when(low < high)
        def begin_with_scores():
            most_ref[...] = score(low, 0, False, even_ref)

        jax.lax.fori_loop(low, high, chunk, None)

        for n in range(c.products):
            some = sum_ref[n] > 0
            share = 1 / jnp.where(some, sum_ref[n], 1)
            log_sum = largest_ref[n] * math.log(2) - jnp.log(share)
            log_sum = jnp.where(some, log_sum, MASKED)
            for m in range(c.heads):
                here, lanes = n * c.heads + m, slice(m * TILE, (m + 1) * TILE)
                out = total_ref[n][:, lanes] * share[:, lanes]
                out_ref[here] = out.T.astype(out_ref.dtype)
                log_ref[here] = log_sum[:, lanes]
            sum_ref[n] = share

        def of_heads(weights):
            return sum(weights[:, n * TILE : (n + 1) * TILE] for n in range(c.heads))

        def add_heads(i, before):
            """What the blocks of a chunk are worth; gives what its last key adds to the next."""
            phases = [slice(n * c.blocks, (n + 1) * c.blocks) for n in range(c.phases)]
            if c.kept:
                weights_ref, at_ref = kept_refs
                factors = [
                    jnp.exp2(at_ref[i, n] - largest_ref[n]) * sum_ref[n] for n in range(c.products)
                ]
                mine = [
                    sum(of_heads(weights_ref[i, n, here] * x) for n, x in enumerate(factors))
                    for here in phases
                ]
            else:
                hide(i)
                even_ref[...] = jnp.zeros_like(even_ref)

                def again(n, _):
                    weights = jnp.exp2(scores(i, n, True) - largest_ref[n]) * sum_ref[n]
                    even_ref[:, :TILE] += of_heads(weights)

                jax.lax.fori_loop(0, c.products, again, None)
                mine = [even_ref[here, :TILE] for here in phases]
            pairs = list(zip(mine, c.shares, strict=True))
            own_share = sum(x * share for x, (share, _) in pairs)
            row = jax.lax.broadcasted_iota(jnp.int32, (c.blocks, TILE), 0)
            last = jnp.zeros((1, TILE))
            if c.overlap > 1:
                spill = sum(x * share for x, (_, share) in pairs if share)
                last = spill[c.blocks - 1 :]
                own_share += jnp.where(row == 0, before, pltpu.roll(spill, 1, 0))
            block = row + i * c.blocks
            always = (block < begin + config.num_first) | (block > own - config.num_local)
            worth = jnp.where(always, jnp.inf, own_share)
            readable = (begin <= block) & (block <= jnp.minimum(own, c.valid - 1))
            worth_ref[i] = jnp.where(readable, worth, -jnp.inf)
            return last

        jax.lax.fori_loop(low, high, add_heads, jnp.zeros((1, TILE)))

        def take_best(k, taken):
            best = choose(worth_ref, low, high, taken)
            chosen_ref[pl.ds(k, 1)] = best
            return best

        jax.lax.fori_loop(0, each, take_best, jnp.full((1, TILE), NOWHERE))
        blocks_ref[...] = in_order(chosen_ref, each)

    def of_tile(b, g, i, *_):
        return b, g, 0, i, 0

    def of_group(b, g, i, *_):
        return b, g, 0, 0, 0

    group = (None, None, c.share, TILE)
    kept = [
        pltpu.VMEM((c.count, c.products, c.keys, c.lanes), jnp.float32),
        pltpu.VMEM((c.count, c.products, 1, c.lanes), jnp.float32),
    ]
    tiles, rows = told(reach, keys.shape[1], config, c)
    out, log_sum, blocks = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(c.batch, c.groups, c.length // TILE),
            in_specs=[
                pl.BlockSpec((None, 4, TILE), lambda b, g, i, *_: (b, 0, i)),
                pl.BlockSpec((*group, c.width), of_tile),
                pl.BlockSpec((None, None, c.count, c.keys, c.width), of_group),
                pl.BlockSpec((None, None, c.count, c.value_width, c.keys), of_group),
            ],
            out_specs=[
                pl.BlockSpec((*group, c.value_width), of_tile),
                pl.BlockSpec((None, None, c.share, 1, TILE), lambda b, g, i, *_: (b, g, 0, 0, i)),
                pl.BlockSpec((None, None, each, TILE), lambda b, g, i, *_: (b, g, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((c.products, 1, c.lanes), jnp.float32),
                pltpu.VMEM((c.products, 1, c.lanes), jnp.float32),
                pltpu.VMEM((c.products, c.value_width, c.lanes), jnp.float32),
                pltpu.VMEM((c.keys, TILE), jnp.float32),
                pltpu.VMEM((1, c.lanes), jnp.float32),
                pltpu.VMEM((c.keys, c.lanes), jnp.float32),
                pltpu.VMEM((c.keys, c.lanes), jnp.float32),
                pltpu.VMEM((c.count, c.blocks, TILE), jnp.float32),
                pltpu.VMEM((each, TILE), jnp.int32),
                *(kept if c.kept else ()),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((c.batch, c.groups, c.share, c.length, c.value_width), c.dtype),
            jax.ShapeDtypeStruct((c.batch, c.groups, c.share, 1, c.length), jnp.float32),
            jax.ShapeDtypeStruct((c.batch, c.groups, each, c.length), jnp.int32),
        ],
        compiler_params=compiler_params(2, 1),
        cost_estimate=c.cost,
        name="compressed_forward",
        interpret=interpret,
    )(
        tiles,
        rows,
        whole_tiles(query).swapaxes(1, 2).reshape(c.batch, c.groups, c.share, c.length, -1),
        in_chunks(keys, c),
        in_chunks(values, c).swapaxes(3, 4),
    )
    out = out.reshape(c.batch, -1, c.length, c.value_width).swapaxes(1, 2)
    log_sum = log_sum.reshape(c.batch, -1, c.length)
    valid = query.shape[1]
    return out[:, :valid], log_sum[..., :valid], blocks.transpose(0, 3, 1, 2)[:, :valid]


def in_strips(operation: Callable[[Any, Any], Any], rows: Any) -> Any:
    """A few rows that stand for many, so that no operation waits for the one just before it."""
    if rows.shape[0] % STRIP:
        return rows
    strips = [rows[n : n + STRIP] for n in range(0, rows.shape[0], STRIP)]
    return functools.reduce(operation, strips)


def beside(arrays: list[Any]) -> Any:
    """Arrays side by side."""
    return jnp.concatenate(arrays, 1) if len(arrays) > 1 else arrays[0]
