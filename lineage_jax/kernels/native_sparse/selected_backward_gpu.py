"""The gradients of the selected branch on a GPU.

Those of queries are computed as the branch is: tile by tile, the blocks of all its queries in turn.
For those of keys and values the lists of blocks are turned round: a program has a block and meets
the queries that selected it, some at a time. A list may be long, as every query selects the first
block; so it is cut in segments, each of which has a program, and what segments find is added by
another kernel, always in the same order.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lineage_jax.kernels.blocks import MASKED
from lineage_jax.kernels.flash_backward_gpu import bytes_of_pair, weights_and_gradients
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.blockwise import from_blocks
from lineage_jax.kernels.native_sparse.config import NSAConfig
from lineage_jax.kernels.native_sparse.selected_gpu import (
    Sizes,
    as_rows,
    from_rows,
    meet,
    own_rows,
    rows_spec,
    sizes,
    spans,
    stored,
    stored_specs,
    sums_as_rows,
    told_specs,
    unions,
)
from lineage_jax.kernels.native_sparse.selectors import selectors
from lineage_jax.kernels.tiles_gpu import (
    Arithmetic,
    Tiles,
    positions,
    read,
    seen,
    write,
    zeros,
)
from lineage_jax.typing import Array, Float, Int

QUERIES = {2: Tiles(64, 32, 4, 2), 4: Tiles(32, 32, 8, 1)}
KEYS = {2: Tiles(64, 64, 8, 2), 4: Tiles(32, 32, 8, 1)}
ADD = Tiles(64, 64, 4, 2)
"""For gradients of queries, and of keys and values, by the bytes of a number; and for the sums."""
SEGMENT = 1024
"""Queries of a segment at most: as many as select a block of the paper's on average."""


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
    inner = jnp.einsum("bthe,bthe->bht", out.astype(jnp.float32), out_grad.astype(jnp.float32))
    # Where nothing is read, there are no weights.
    log_sum = jnp.where(log_sum > MASKED / 2, log_sum * math.log2(math.e), -MASKED)
    given = query, keys, values, blocks, out_grad.astype(query.dtype), log_sum, inner, config, reach
    return (
        of_queries(*given, interpret=interpret),
        *of_stored(*given, interpret=interpret),
    )


def of_queries(
    query, keys, values, blocks, out_grad, log_sum, inner, config, reach, *, interpret: bool
) -> Float[Array, "B T H K"]:
    """The gradient of queries."""
    unit, each = Arithmetic(interpret), bytes_of_pair(query, values)
    tiles, scale = QUERIES[query.dtype.itemsize], 1 / math.sqrt(query.shape[-1])
    tiles = tiles.fitted(each, tiles.stages * each)
    s = sizes(query, keys, values, blocks.shape[-1], config, tiles)

    def selected_backward_queries(union_ref, count_ref, spans_ref, query_ref, keys_ref, *refs):
        values_ref, grad_ref, log_ref, inner_ref, of_query_ref = refs
        rows = own_rows(s)
        heads, grads = read(query_ref, rows), read(grad_ref, rows)
        facts = log_ref[rows][:, None], inner_ref[rows][:, None]

        def add(at, here, total):
            near = read(keys_ref, at)
            products = (
                unit.inner_products(heads, near),
                unit.inner_products(grads, read(values_ref, at)),
            )
            _, of_scores = weights_and_gradients(unit, *products, *facts, here, scale)
            return unit.add_products(total, of_scores, near)

        start = zeros(s.rows, s.width)
        total = meet(s, union_ref, count_ref, spans_ref, add, start)
        write(of_query_ref, tuple(x * scale for x in total), rows)

    found = pl.pallas_call(
        selected_backward_queries,
        grid=(s.tiles, s.groups, s.batch),
        in_specs=[
            *(*told_specs(s), rows_spec(s, s.width), *stored_specs(s)),
            *(rows_spec(s, s.value_width), rows_spec(s), rows_spec(s)),
        ],
        out_specs=rows_spec(s, s.width),
        out_shape=jax.ShapeDtypeStruct(
            (s.batch, s.length * s.groups * s.share, s.width), query.dtype
        ),
        compiler_params=tiles.params,
        interpret=interpret,
        name="selected_backward_queries",
    )(
        *unions(blocks, s),
        spans(reach, s),
        *(as_rows(query, s), stored(keys, s), stored(values, s), as_rows(out_grad, s)),
        *(sums_as_rows(log_sum, -MASKED, s), sums_as_rows(inner, 0.0, s)),
    )
    return from_rows(found, query.shape, s)


def of_stored(
    query, keys, values, blocks, out_grad, log_sum, inner, config, reach, *, interpret: bool
) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G E"]]:
    """The gradients of keys and of values."""
    unit, each = Arithmetic(interpret), bytes_of_pair(query, values)
    tiles, scale = KEYS[query.dtype.itemsize], 1 / math.sqrt(query.shape[-1])
    tiles = tiles.fitted(tiles.stages * each, each)
    s = sizes(query, keys, values, blocks.shape[-1], config, tiles)

    def selected_backward_keys(segment_ref, pairs_ref, spans_ref, query_ref, keys_ref, *refs):
        values_ref, grad_ref, log_ref, inner_ref, of_keys_ref, of_values_ref = refs
        block, begin, end = (segment_ref[n] for n in range(3))
        start, group = block * s.size + pl.program_id(1) * s.columns, pl.program_id(2)
        near, attended = (read(ref, pl.ds(start, s.columns)) for ref in (keys_ref, values_ref))
        key = positions(start, s.columns)[:, None]
        row = jax.lax.iota(jnp.int32, s.rows)
        member, head = jax.lax.div(row, s.share), jax.lax.rem(row, s.share)

        def add(m, sums):
            place = begin + m * s.queries + member
            query = pairs_ref[place]
            last = jnp.minimum(spans_ref[1, query], (block + 1) * s.size - 1)
            last = jnp.where(place < end, last, -1)  # no key before it
            here = seen((spans_ref[0, query][None], last[None]), key)
            rows = (query * s.groups + group) * s.share + head
            heads, grads = read(query_ref, rows), read(grad_ref, rows)
            facts = log_ref[rows][None], inner_ref[rows][None]
            products = unit.inner_products(near, heads), unit.inner_products(attended, grads)
            weights, of_scores = weights_and_gradients(unit, *products, *facts, here, scale)
            of_values = unit.add_products(sums[1], weights, grads)
            return unit.add_products(sums[0], of_scores, heads), of_values

        sums = zeros(s.columns, s.width), zeros(s.columns, s.value_width)
        times = jax.lax.div(end - begin + s.queries - 1, s.queries)
        of_keys, of_values = jax.lax.fori_loop(0, times, add, sums)

        @pl.when(begin < end)
        def finish():
            write(of_keys_ref, tuple(x * scale for x in of_keys), slice(None))
            write(of_values_ref, of_values, slice(None))

    def every(*shape):  # of a row of the batch
        return pl.BlockSpec((None, *shape), lambda i, p, g, b: (b, *(0 for _ in shape)))

    def of_group(*shape):
        return pl.BlockSpec((None, *shape), lambda i, p, g, b: (b, 0, g, 0))

    def found(width):
        shape = (None, None, None, s.columns, width)
        return pl.BlockSpec(shape, lambda i, p, g, b: (b, g, i, p, 0))

    bounds, pairs = selectors(blocks, s.count)
    segments, of_blocks = cut_lists(s, bounds, pairs.shape[-1])
    rows = s.length * s.groups * s.share
    shape = (*segments.shape[:3], s.parts * s.columns)
    parts = pl.pallas_call(
        selected_backward_keys,
        grid=(segments.shape[2], s.parts, s.groups, s.batch),
        in_specs=[
            pl.BlockSpec((None, None, None, 3), lambda i, p, g, b: (b, g, i, 0)),
            pl.BlockSpec((None, None, pairs.shape[-1] + s.queries), lambda i, p, g, b: (b, g, 0)),
            *(every(2, s.length), every(rows, s.width)),
            *(of_group(s.num_keys, None, width) for width in (s.width, s.value_width)),
            *(every(rows, s.value_width), every(rows), every(rows)),
        ],
        out_specs=[found(s.width), found(s.value_width)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, width), jnp.float32) for width in (s.width, s.value_width)
        ],
        compiler_params=tiles.params,
        interpret=interpret,
        name="selected_backward_keys",
    )(
        segments,
        jnp.pad(pairs, ((0, 0), (0, 0), (0, s.queries))),
        spans(reach, s),
        *(as_rows(query, s), stored(keys, s), stored(values, s), as_rows(out_grad, s)),
        *(sums_as_rows(log_sum, -MASKED, s), sums_as_rows(inner, 0.0, s)),
    )
    grads = []
    for part, like in zip(parts, (keys, values), strict=True):
        whole = added(s, part, of_blocks, like.dtype, interpret=interpret)
        whole = whole[..., : s.size, : like.shape[-1]]
        grads.append(from_blocks(whole, like.shape[1]))
    return grads[0], grads[1]


def cut_lists(
    s: Sizes, bounds: Int[Array, "B G bounds"], pairs: int
) -> tuple[Int[Array, "B G segments 3"], Int[Array, "B G J 2"]]:
    """Segments of lists of queries: the block, and where queries begin and end.

    And of each block its first segment, and the one after its last.
    """
    counts = jnp.diff(bounds)
    each = -(-counts // SEGMENT)
    ends = jnp.cumsum(each, axis=-1)
    segment = jnp.arange(s.count + pairs // SEGMENT, dtype=jnp.int32)
    search = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, segment, side="right")))
    block = search(ends).astype(jnp.int32)  # that of no block is after the last one
    some, at = block < s.count, jnp.minimum(block, s.count - 1)

    def taken(x):
        return jnp.take_along_axis(x, at, axis=-1)

    begin = taken(bounds) + (segment[None, None] - taken(ends - each)) * SEGMENT
    end = jnp.minimum(begin + SEGMENT, taken(bounds[..., 1:]))
    begin, end = (jnp.where(some, x, 0) for x in (begin, end))
    return jnp.stack((at, begin, end), -1), jnp.stack((ends - each, ends), -1).astype(jnp.int32)


def added(
    s: Sizes,
    parts: Float[Array, "B G segments P K"],
    of_blocks: Int[Array, "B G J 2"],
    dtype: Any,
    *,
    interpret: bool,
) -> Float[Array, "B G J P K"]:
    """What the segments of each block add up to."""
    width = parts.shape[-1]

    def selected_backward_sums(bounds_ref, parts_ref, out_ref):
        def add(n, sums):
            found = read(parts_ref, n, slice(None))
            return tuple(x + y for x, y in zip(sums, found, strict=True))

        start = zeros(s.columns, width)
        sums = jax.lax.fori_loop(bounds_ref[0], bounds_ref[1], add, start)
        write(out_ref, sums, slice(None))

    def block(p_axis, *shape):
        return pl.BlockSpec((None, None, *shape), p_axis)

    return pl.pallas_call(
        selected_backward_sums,
        grid=(s.count, s.parts, s.groups, s.batch),
        in_specs=[
            block(lambda j, p, g, b: (b, g, j, 0), None, 2),
            block(lambda j, p, g, b: (b, g, 0, p, 0), parts.shape[2], s.columns, width),
        ],
        out_specs=block(lambda j, p, g, b: (b, g, j, p, 0), None, s.columns, width),
        out_shape=jax.ShapeDtypeStruct((*of_blocks.shape[:3], s.parts * s.columns, width), dtype),
        compiler_params=ADD.params,
        interpret=interpret,
        name="selected_backward_sums",
    )(of_blocks, parts)
