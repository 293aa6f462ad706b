"""The gradients of the selected branch on a TPU.

Those of queries are computed as the branch is: query by query. For those of keys and values the
lists of blocks are turned round: block by block, the queries that selected it are fetched from
memory, each with all that is to be known of it in one slab of rows.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import LANES
from lineage_jax.kernels.flash_tpu import product
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.blockwise import from_blocks, in_blocks
from lineage_jax.kernels.native_sparse.chip_tpu import (
    LEAST,
    NOWHERE,
    TILE,
    by_group,
    compiler_params,
    matrix_width,
    spans,
    ungrouped,
)
from lineage_jax.kernels.native_sparse.config import NSAConfig
from lineage_jax.kernels.native_sparse.selected_blocks_tpu import (
    STRIP,
    Sizes,
    buffers,
    fetched,
    heads_spec,
    hidden_buffer,
    hide,
    sizes,
    stored_specs,
    told,
    told_specs,
)
from lineage_jax.kernels.native_sparse.selected_tpu import (
    ATTENDED,
    SCORED,
    divided,
    mixed,
    several,
)
from lineage_jax.kernels.native_sparse.selectors import selectors
from lineage_jax.typing import Array, Float, Int

ROWS = 256
"""Rows, heads of queries, that meet a block at once."""
FACTS = 4
"""Told of each query's head: inner product, logarithmic sum, first key, distance to the last."""
PIECES = 3
"""Numbers of 8 bits that a fact is the sum of: what bfloat16 holds."""


def selected_backward(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    blocks: Int[Array, "B T G N"],
    out: Float[Array, "B T H E"],
    log_sum: Float[Array, "B H T"],
    out_grad: Float[Array, "B T H E"],
    config: NSAConfig,
    reach: Intervals,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S G K"], Float[Array, "B S G E"]]:
    """The gradients of queries, keys and values, from what `selected_forward` took and returned."""
    s = sizes(query, keys, values, blocks, config)
    inner = jnp.einsum("bthe,bthe->bht", out.astype(jnp.float32), out_grad.astype(jnp.float32))
    given = query, keys, values, blocks, out_grad.astype(s.dtype), log_sum, inner, reach
    return (
        of_queries(s, *given, interpret=interpret),
        *of_stored(s, *given, interpret=interpret),
    )


def of_queries(
    s: Sizes, query, keys, values, blocks, out_grad, log_sum, inner, reach, *, interpret: bool
) -> Float[Array, "B T H K"]:
    """The gradient of queries, [B, T, H, K]."""
    scale, log2_e = 1 / math.sqrt(s.width), math.log2(math.e)
    s = dataclasses.replace(s, across=(matrix_width(), matrix_width()))  # both meet a query's heads

    def kernel(blocks_ref, told_ref, order_ref, query_ref, grad_ref, log_ref, inner_ref, *refs):
        keys_ref, values_ref, of_query_ref, *refs = refs
        hidden_ref, scores_ref, of_weights_ref, of_scores_ref, *buffers = refs
        keys_come, keys_of = fetched(s, blocks_ref, keys_ref, *buffers[:2])
        values_come, values_of = fetched(s, blocks_ref, values_ref, *buffers[2:4])
        again_come, again_of = fetched(s, blocks_ref, keys_ref, *buffers[4:])
        at_query = jax.lax.broadcasted_iota(jnp.int32, (s.share, TILE), 1)

        def meet(first, n):
            """Scores, and gradients of weights, of a part of a query's blocks."""
            i, part = divided(n, s.parts)
            t, step = first + i, first * s.parts + n
            keys_come(step)
            values_come(step)
            heads, grad = s.keys.laid(query_ref[t]), s.values.laid(grad_ref[t])
            for at, chunk in s.chunks:
                scores_ref[part, i, :, chunk] = s.keys.scores(heads, keys_of(step, at))
                of_weights_ref[part, i, :, chunk] = s.values.scores(grad, values_of(step, at))

        def of_query(first, i):
            """What the gradients of its scores add up to."""
            t = first + i
            log, inner = (
                jnp.where(at_query == t, ref[...], 0).sum(1, keepdims=True)  # R 1
                for ref in (log_ref, inner_ref)
            )

            def part(n, old):
                step = t * s.parts + n
                again_come(step)
                for piece in s.pieces:
                    scores = scores_ref[n, i, :, piece] * (scale * log2_e)
                    weights = jnp.exp2(scores - log * log2_e + hidden_ref[n, i, :, piece])
                    of_weights = of_weights_ref[n, i, :, piece] - inner
                    of_scores_ref[i, :, piece] = (weights * of_weights).astype(s.dtype)
                sums = [
                    s.keys.sums(of_scores_ref[i, :, chunk], again_of(step, at))
                    for at, chunk in s.chunks
                ]
                found = tuple(map(sum, zip(*sums, strict=True)))
                return tuple(map(jnp.add, old, found)) if old else found

            total = s.keys.whole(several(s.parts, part)) * scale
            of_query_ref[t] = total.astype(of_query_ref.dtype)

        def strip(first):
            hide(s, first, told_ref, order_ref, hidden_ref)
            mixed(STRIP * s.parts, SCORED, lambda n: meet(first, n))
            mixed(STRIP, ATTENDED, lambda i: of_query(first, i))

        mixed(TILE // STRIP, 1, lambda i: strip(i * STRIP))

    def sums(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, s.length - x.shape[2])))
        return x.reshape(s.batch, s.groups, s.share, s.length)

    sums_spec = pl.BlockSpec((None, None, s.share, TILE), lambda b, g, i: (b, g, 0, i))
    of_query = pl.pallas_call(
        kernel,
        grid=(s.batch, s.groups, s.length // TILE),
        in_specs=[
            *told_specs(s),
            heads_spec(s, s.width),
            heads_spec(s, s.value_width),
            sums_spec,
            sums_spec,
            *stored_specs(s),
        ],
        out_specs=heads_spec(s, s.width),
        out_shape=jax.ShapeDtypeStruct((s.batch, s.length, s.groups, s.share, s.width), s.dtype),
        scratch_shapes=[
            hidden_buffer(s),
            *[pltpu.VMEM((s.parts, STRIP, s.share, s.together * s.size), jnp.float32)] * 2,
            pltpu.VMEM((STRIP, s.share, s.together * s.size), s.dtype),
            *buffers(s, s.keys, s.values, s.keys),
        ],
        compiler_params=compiler_params(2, 1),
        cost_estimate=s.cost(2 * s.width + s.value_width, passes=2),
        name="selected_backward_queries",
        interpret=interpret,
    )(
        *told(blocks, reach, keys.shape[1], s),
        by_group(query, s.groups),
        by_group(out_grad, s.groups),
        sums(jnp.where(log_sum > LEAST, log_sum, 0)),
        sums(inner),
        s.keys.stored(keys),
        s.values.stored(values),
    )
    return ungrouped(of_query, query.shape[1])


def of_stored(
    s: Sizes, query, keys, values, blocks, out_grad, log_sum, inner, reach, *, interpret: bool
) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G E"]]:
    """The gradients of keys and of values."""
    scale, log2_e = 1 / math.sqrt(s.width), math.log2(math.e)
    slabs = in_slabs(s, query, out_grad, log_sum, inner, reach, keys.shape[1])
    bounds, selected_by = turned(s, blocks)
    rows, columns = slabs.shape[3:]
    begin_of_query = -(-s.value_width // LANES) * LANES
    width, facts = columns - begin_of_query, 32 // s.dtype.itemsize
    each = max(n for n in range(1, TILE + 1) if TILE % n == 0 and n * rows <= max(ROWS, rows))

    def kernel(bounds_ref, queries_ref, slabs_ref, keys_ref, values_ref, *refs):
        of_keys_ref, of_values_ref, list_ref, slab_ref, parity_ref, *semaphores = refs
        row, group, j = (pl.program_id(axis) for axis in range(3))
        of_keys_ref[...] = jnp.zeros_like(of_keys_ref)
        of_values_ref[...] = jnp.zeros_like(of_values_ref)

        def start_of(block):
            first = (row * s.groups + group) * (s.count + 1)
            return bounds_ref[first + jnp.minimum(block, s.count)]

        def lists_of(block):
            count = start_of(block + 1) - start_of(block)
            return jnp.maximum(jax.lax.div(count + TILE - 1, TILE), 1)

        def following(block, i):
            more = i + 1 < lists_of(block)
            return jnp.where(more, block, block + 1), jnp.where(more, i + 1, 0)

        def list_copy(block, i, side):
            begin = jax.lax.div(start_of(block) + i * TILE, TILE)
            source = queries_ref.at[row, group, pl.ds(begin, 2)]
            return pltpu.make_async_copy(source, list_ref.at[side], semaphores[0].at[side])

        def listed(block, i):
            """Where a list begins in its tile, and how many queries follow."""
            begin = start_of(block) + i * TILE
            return jax.lax.rem(begin, TILE), start_of(block + 1) - begin

        def fetch(listed, side, n):
            """Begins to fetch the slab of the n-th query of a list."""
            begin, count = listed
            place = begin + n
            query = list_ref[side, jax.lax.shift_right_logical(place, 7), 0, place & (TILE - 1)]
            query = jnp.where(n < count, query, s.length)
            source = slabs_ref.at[row, query, group]
            pltpu.make_async_copy(source, slab_ref.at[side, n], semaphores[1].at[side]).start()

        def await_slabs(side):
            slab = slab_ref.at[side]
            pltpu.make_async_copy(slab, slab, semaphores[1].at[side]).wait()

        @pl.when(j == 0)
        def start():
            parity_ref[0] = 0
            list_copy(0, 0, 0).start()
            list_copy(0, 0, 0).wait()
            list_copy(*following(0, 0), 1).start()
            first = listed(0, 0)
            jax.lax.fori_loop(0, TILE, lambda n, _: fetch(first, 0, n), None)

        position = jax.lax.broadcasted_iota(jnp.int32, (s.size, 1), 0) + j * s.size
        position = position.astype(jnp.float32)

        def meet(slab):
            """A block of keys with some rows of queries."""
            grads, queries = slab[:, : s.value_width], slab[:, begin_of_query:]
            known = product(keys_ref[...], queries, (1, 1))  # facts and keys, rows
            inner, log, first, span = (known[n : n + 1] for n in range(FACTS))
            weights = jnp.exp2(known[facts:] * (scale * log2_e) - log)
            behind = position - first
            weights = jnp.where((behind >= 0) & (behind <= span), weights, 0)
            of_weights = product(values_ref[...], grads, (1, 1))
            of_scores = (weights * (of_weights - inner)).astype(s.dtype)
            of_values_ref[...] += product(weights.astype(s.dtype), grads, (1, 0))
            of_keys_ref[...] += product(of_scores, queries, (1, 0))

        def meet_list(i, _):
            side = parity_ref[0]
            other = 1 - side
            parity_ref[0] = other
            after = following(j, i)
            list_copy(*after, other).wait()
            list_copy(*following(*after), side).start()  # this list is used up
            await_slabs(side)
            ahead = listed(*after)

            def some(m, _):
                for n in range(each):
                    fetch(ahead, other, m * each + n)
                meet(slab_ref[side, pl.ds(m * each, each)].reshape(each * rows, columns))

            jax.lax.fori_loop(0, TILE // each, some, None)

        jax.lax.fori_loop(0, lists_of(j), meet_list, None)

        @pl.when(j == s.count - 1)
        def end():  # what was begun after the last list
            await_slabs(parity_ref[0])
            list_copy(s.count, 0, 1 - parity_ref[0]).wait()

    def of_block(b, g, j, *_):
        return b, g, j, 0, 0

    def block(rows, width):
        return pl.BlockSpec((None, None, None, rows, width), of_block)

    shape = (s.batch, s.groups, s.count, s.size)
    of_keys, of_values = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(s.batch, s.groups, s.count),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
                block(facts + s.size, width),
                block(s.size, s.value_width),
            ],
            out_specs=[block(s.size, width), block(s.size, s.value_width)],
            scratch_shapes=[
                pltpu.SMEM((2, 2, 1, TILE), jnp.int32),
                pltpu.VMEM((2, TILE, rows, columns), s.dtype),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*shape, width), jnp.float32),
            jax.ShapeDtypeStruct((*shape, s.value_width), jnp.float32),
        ],
        compiler_params=compiler_params(2, 1),
        cost_estimate=s.cost(2 * (s.width + s.value_width), passes=s.each),
        name="selected_backward_keys",
        interpret=interpret,
    )(bounds, selected_by, slabs, with_facts(s, keys, facts, width), in_blocks(values, s.size))
    of_keys = from_blocks(of_keys[..., : s.width] * scale, keys.shape[1])
    return of_keys.astype(keys.dtype), from_blocks(of_values, keys.shape[1]).astype(values.dtype)


def turned(
    s: Sizes, blocks: Int[Array, "B T G N"]
) -> tuple[Int[Array, "bounds"], Int[Array, "B G tiles 1 tile"]]:
    """Where the queries of each block of each row and head begin; and queries, sorted by block.

    There are two tiles of queries more than there would have to be.
    """
    bounds, queries = selectors(blocks, s.count)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 2 * TILE + -queries.shape[-1] % TILE)))
    return bounds.ravel(), queries.reshape(*queries.shape[:2], -1, 1, TILE)


def in_slabs(
    s: Sizes, query, out_grad, log_sum, inner, reach: Intervals, length: int
) -> Float[Array, "B queries G rows columns"]:
    """Of each query the gradients, the heads and the facts, side by side; and one of no query.

    A fact is in pieces, which a product with ones adds up again: so it comes out as a row.
    """
    count = s.length + 1
    first, span = spans(reach, length)
    first = jnp.pad(first, ((0, 0), (0, 1)), constant_values=NOWHERE)
    span = jnp.pad(span, ((0, 0), (0, 1)))
    shape = s.batch, s.groups * s.share, count
    ends = [jnp.broadcast_to(x[:, None], shape) for x in (first, span)]
    more = ((0, 0), (0, 0), (0, count - query.shape[1]))
    sums = [jnp.pad(x, more) for x in (inner, log_sum * math.log2(math.e))]
    pieces, rest = [], jnp.stack([*sums, *ends], -1).astype(jnp.float32)  # B H T facts
    for _ in range(PIECES):
        pieces.append(rest.astype(s.dtype))
        rest -= pieces[-1].astype(jnp.float32)
    facts = jnp.concatenate(pieces, -1).swapaxes(1, 2)

    def part(heads, width):
        more = ((0, 0), (0, count - heads.shape[1]), (0, 0), (0, width - heads.shape[-1]))
        return jnp.pad(heads, more).reshape(s.batch, count, s.groups, s.share, width)

    end = -(s.width + FACTS * PIECES) % LANES
    parts = [
        part(out_grad, -(-s.value_width // LANES) * LANES),
        part(query, s.width),
        part(facts, FACTS * PIECES + end),
    ]
    slabs = jnp.concatenate(parts, -1)
    padding = -s.share % (32 // s.dtype.itemsize)
    return jnp.pad(slabs, ((0, 0),) * 3 + ((0, padding), (0, 0))) if padding else slabs


def with_facts(s: Sizes, keys, facts: int, width: int) -> Float[Array, "B G J rows columns"]:
    """Blocks of keys, and before each as many rows that add up the pieces of facts."""
    adds = jnp.tile(jnp.eye(facts, FACTS, dtype=s.dtype), (1, PIECES))
    adds = jnp.pad(adds, ((0, 0), (s.width, width - s.width - FACTS * PIECES)))
    keys = jnp.pad(in_blocks(keys, s.size), ((0, 0),) * 4 + ((0, width - s.width),))
    adds = jnp.broadcast_to(adds, (*keys.shape[:3], facts, width))
    return jnp.concatenate([adds, keys], 3)
