"""The kernels of flash attention for TPU: what `lineage_jax.kernels.flash` prepares comes here.

A TPU takes the blocks of a grid in order, so what many blocks add up to stays in its memory on the
chip: a block of queries meets its keys in turn, forward; backward, a block of keys meets its
queries, and the gradient of the queries stays for a chunk of many blocks. Blocks that a causal mask
or a window hides are neither fetched nor computed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import LANES, Blocks, Spans, aligned

MASKED = -1e30  # finite, so that differences of two masked scores are not NaN
VMEM_BYTES = 64 * 2**20
"""Of memory on the chip that a kernel may take; a TPU v5p has so much for each core."""


def visible(blocks: Blocks, queries: Any, keys: Any, window: Any) -> Any:
    """Which scores of a block are read, from the places of its queries and keys."""
    if blocks.causal:
        return (queries - keys).astype(jnp.uint32) < window.astype(jnp.uint32)  # no less than 0
    behind = (queries - keys + blocks.length).astype(jnp.uint32)
    return behind < 2 * blocks.length


def when_visible(blocks: Blocks, spans: Spans, row: Any, i: Any, j: Any, meet: Any) -> None:
    """Calls `meet(masked)` if a block of scores is read; masked if some of them are not."""
    some, whole = blocks.visible(spans, row, i, j)
    if blocks.masked < 1:
        pl.when(some & whole)(lambda: meet(False))
    pl.when(some & jnp.logical_not(whole))(lambda: meet(True))


def product(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """a b, contracted over one axis each, accumulated in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def spread(x: Any, width: int) -> Any:
    """Rows that hold one number, [R, LANES], as wide as given."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def block_of_head(
    blocks: Blocks, rows: int, where: Callable[..., tuple[Any, Any, Any]]
) -> pl.BlockSpec:
    """Positions of one head, [rows, K], of heads as they are stored.

    Args:
      blocks: of the call.
      rows: how many.
      where: from indices of the grid to the row of the batch, the head, and the block.
    """

    def columns(*at):
        n, h, i = where(*at)
        return n, i, h

    def matrix(*at):
        return *where(*at), 0

    if aligned(blocks.width):
        return pl.BlockSpec((None, rows, blocks.width), columns)
    return pl.BlockSpec((None, None, rows, blocks.width), matrix)


def forward(blocks: Blocks, spans: Spans, places, query, keys, values, *, interpret: bool):
    """Attended values, stored as the queries are, and logarithmic sums [B, H, 1, T]."""
    b, size, width = blocks, blocks.size, blocks.width
    scale = math.log2(math.e) / math.sqrt(width)  # for powers of two, which are what a TPU has

    def kernel(*refs):
        spans, (at_ref, key_at_ref, query_ref, keys_ref, values_ref, *rest) = told(refs)
        out_ref, log_ref, largest_ref, sum_ref, total_ref = rest
        row, i, j = (pl.program_id(axis) for axis in (0, 2, 3))

        @pl.when(j == 0)
        def start():
            largest_ref[...] = jnp.full_like(largest_ref, MASKED)
            sum_ref[...] = jnp.zeros_like(sum_ref)
            total_ref[...] = jnp.zeros_like(total_ref)

        def meet(masked):
            values = values_ref[...]
            scores = product(query_ref[...], keys_ref[...], (1, 1)) * scale  # queries, keys
            if masked:
                reads = visible(b, at_ref[0], key_at_ref[0], spans.window[0])
                scores = jnp.where(reads, scores, MASKED)
            old = largest_ref[...]
            largest = jnp.maximum(old, scores.max(1, keepdims=True))
            weights = jnp.exp2(scores - spread(largest, size))
            keep = jnp.exp2(old - largest)
            largest_ref[...] = largest
            sum_ref[...] = sum_ref[...] * keep + weights.sum(1, keepdims=True)
            new = product(weights.astype(values.dtype), values, (1, 0))
            total_ref[...] = total_ref[...] * spread(keep, width) + new

        when_visible(b, spans, row, i, j, meet)

        @pl.when(j == b.count - 1)
        def finish():
            out_ref[...] = (total_ref[...] / spread(sum_ref[...], width)).astype(out_ref.dtype)
            log_sum = largest_ref[...] * math.log(2) + jnp.log(sum_ref[...])
            log_ref[0, 0] = log_sum.T[:1]

    share = b.heads // b.groups

    def of_queries(n, h, i, j, *refs):
        return n, h, i

    def of_keys(n, h, i, j, *refs):
        return n, h // share, jnp.clip(j, *b.keys_of(Spans(*refs), n, i))

    block = functools.partial(block_of_head, b, size)
    at = [
        pl.BlockSpec((1, size, 1), lambda n, h, i, *_: (n, i, 0)),
        pl.BlockSpec((1, 1, size), lambda n, *at: (n, 0, of_keys(n, *at)[2])),
    ]
    scores = b.batch * b.heads * b.pairs * size**2
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(spans),
            grid=(b.batch, b.heads, b.count, b.count),
            in_specs=[*at, block(of_queries), block(of_keys), block(of_keys)],
            out_specs=[
                block(of_queries),
                pl.BlockSpec((1, 1, 1, size), lambda n, h, i, *_: (n, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((size, LANES), jnp.float32),
                pltpu.VMEM((size, LANES), jnp.float32),
                pltpu.VMEM((size, width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((b.batch, b.heads, 1, b.length), jnp.float32),
        ],
        compiler_params=compiler_params(3),
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * width,
            transcendentals=scores,
            bytes_accessed=2 * query.nbytes + 2 * b.pairs * query.nbytes // b.count,
        ),
        metadata=metadata(b),
        name="flash_attention_forward",
        interpret=interpret,
    )(*spans, *places, query, keys, values)


def inner_products(blocks: Blocks, out, out_grad, *, interpret: bool):
    """Of each position's attended values and their gradient, for each head, [B, H, 1, T]."""
    b = blocks

    def kernel(out_ref, grad_ref, inner_ref):
        products = out_ref[...].astype(jnp.float32) * grad_ref[...].astype(jnp.float32)
        sums = products.sum(1, keepdims=True)
        inner_ref[0, 0] = jnp.broadcast_to(sums, (b.size, LANES)).T[:1]

    block = block_of_head(b, b.size, lambda n, h, i: (n, h, i))
    return pl.pallas_call(
        kernel,
        grid=(b.batch, b.heads, b.count),
        in_specs=[block, block],
        out_specs=pl.BlockSpec((1, 1, 1, b.size), lambda n, h, i: (n, h, 0, i)),
        out_shape=jax.ShapeDtypeStruct((b.batch, b.heads, 1, b.length), jnp.float32),
        compiler_params=compiler_params(3, 0),
        cost_estimate=pl.CostEstimate(
            flops=2 * out.size, transcendentals=0, bytes_accessed=out.nbytes + out_grad.nbytes
        ),
        name="inner_products",
        interpret=interpret,
    )(out, out_grad)


def backward(
    blocks: Blocks,
    spans: Spans,
    places,
    query,
    keys,
    values,
    out_grad,
    log_sum,
    inner,
    *,
    interpret: bool,
):
    """Gradients of queries, keys and values, stored as these are, and in their types.

    Scores are computed keys by queries, so that what there is one of for each query is a row.
    """
    b, size, width, chunk = blocks, blocks.size, blocks.width, blocks.chunk
    scale, share, chunks = 1 / math.sqrt(width), b.heads // b.groups, b.count // blocks.chunk
    log2_e = math.log2(math.e)

    def kernel(*refs):
        spans, (at_ref, key_at_ref, query_ref, keys_ref, values_ref, *rest) = told(refs)
        grad_ref, log_ref, inner_ref, of_query_ref, of_keys_ref, of_values_ref, *sums = rest
        query_sum, keys_sum, values_sum = sums
        row, part, j, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
        i = part * chunk + step

        @pl.when((j == 0) & (step == 0))
        def start_chunk():
            query_sum[...] = jnp.zeros_like(query_sum)

        @pl.when(step == 0)
        def start_keys():
            keys_sum[...] = jnp.zeros_like(keys_sum)
            values_sum[...] = jnp.zeros_like(values_sum)

        def meet(masked):
            query, keys, grad = query_ref[...], keys_ref[...], grad_ref[...]
            scores = product(keys, query, (1, 1)) * (scale * log2_e)  # keys, queries
            if masked:
                reads = visible(b, at_ref[0], key_at_ref[0], spans.window[0])
                scores = jnp.where(reads, scores, MASKED)
            weights = jnp.exp2(scores - log_ref[0, 0] * log2_e)
            values_sum[...] += product(weights.astype(grad.dtype), grad, (1, 0))
            of_weights = product(values_ref[...], grad, (1, 1))
            of_scores = (weights * (of_weights - inner_ref[0, 0])).astype(query.dtype)
            keys_sum[...] += product(of_scores, query, (1, 0))
            here = pl.ds(pl.multiple_of(step * size, size), size)
            query_sum[here] += product(of_scores, keys, (0, 0))

        when_visible(b, spans, row, i, j, meet)

        @pl.when(step == chunk - 1)
        def finish_keys():
            of_keys_ref[...] = (keys_sum[...] * scale).astype(of_keys_ref.dtype)
            of_values_ref[...] = values_sum[...].astype(of_values_ref.dtype)

        @pl.when((j == b.count - 1) & (step == chunk - 1))
        def finish_chunk():
            of_query_ref[...] = (query_sum[...] * scale).astype(of_query_ref.dtype)

    def read(n, c, j, step, *refs):
        first, last = b.queries_of(Spans(*refs), n, j)
        here = jnp.clip(c * chunk + step, first, last)
        return jnp.clip(here, c * chunk, c * chunk + chunk - 1)

    def of_queries(n, h, c, j, step, *refs):
        return n, h, read(n, c, j, step, *refs)

    def of_keys(n, h, c, j, step, *refs):
        return n, h // share, j

    def of_chunk(n, h, c, j, step, *refs):
        return n, h, c

    def of_part(n, h, c, j, step, *refs):
        return n * chunks + c, h, j

    def by_row(n, h, c, j, step, *refs):
        return n, h, 0, read(n, c, j, step, *refs)

    block = functools.partial(block_of_head, b, size)
    row = pl.BlockSpec((1, 1, 1, size), by_row)
    at = [
        pl.BlockSpec((1, 1, size), lambda n, h, *at: (n, 0, read(n, *at))),
        pl.BlockSpec((1, size, 1), lambda n, h, c, j, *_: (n, j, 0)),
    ]
    # Of each head of queries, and each chunk of them: what one head of keys and values is read by.
    parts = (b.batch * chunks, *query.shape[1:])
    part_type = keys.dtype if share * chunks == 1 else jnp.float32
    scores = b.batch * b.heads * b.pairs * size**2
    of_query, of_keys_, of_values = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(spans),
            grid=(b.batch, b.heads, chunks, b.count, chunk),
            in_specs=[
                *(*at, block(of_queries), block(of_keys), block(of_keys)),
                *(block(of_queries), row, row),
            ],
            out_specs=[
                block_of_head(b, chunk * size, of_chunk),
                *(block(of_part), block(of_part)),
            ],
            scratch_shapes=[
                pltpu.VMEM((chunk * size, width), jnp.float32),
                pltpu.VMEM((size, width), jnp.float32),
                pltpu.VMEM((size, width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            *(jax.ShapeDtypeStruct(parts, part_type),) * 2,
        ],
        compiler_params=compiler_params(3, 2),
        cost_estimate=pl.CostEstimate(
            flops=10 * scores * width,
            transcendentals=scores,
            bytes_accessed=4 * query.nbytes + 2 * b.pairs * query.nbytes // b.count,
        ),
        metadata=metadata(b),
        name="flash_attention_backward",
        interpret=interpret,
    )(*spans, *places[::-1], query, keys, values, out_grad, log_sum, inner)

    def whole(x: Any, like: Any) -> Any:
        if aligned(width):
            x = x.reshape(b.batch, chunks, b.length, b.groups, share, width).sum((1, 4))
        else:
            x = x.reshape(b.batch, chunks, b.groups, share, b.length, width).sum((1, 3))
        return x.reshape(like.shape).astype(like.dtype)

    return of_query, whole(of_keys_, keys), whole(of_values, values)


def told(refs: tuple[Any, ...]) -> tuple[Spans, tuple[Any, ...]]:
    """What a kernel is told of spans before it begins, and the other references."""
    count = len(Spans._fields)
    return Spans(*refs[:count]), refs[count:]


def metadata(blocks: Blocks) -> dict[str, str]:
    """What a cost model has to know of a kernel besides its FLOPs."""
    return {"masked": f"{blocks.masked:.6f}"}


def compiler_params(parallel: int, arbitrary: int = 1) -> Any:
    """For a grid whose first axes are independent, and whose last are in order."""
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL,) * parallel + (pltpu.ARBITRARY,) * arbitrary,
        vmem_limit_bytes=VMEM_BYTES,
    )
