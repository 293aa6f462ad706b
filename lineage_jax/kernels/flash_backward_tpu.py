"""Flash attention for TPU, backward: gradients by the same steps as `flash_tpu.forward`.

Tiles of queries meet their keys in turn, and the heads of a group one after another. Meanwhile the
gradients of keys and values stay on the chip: of all keys, or if they are too many, of a chunk of
them, with one call for each. Then what a chunk adds to the gradients of queries is added in memory.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import FIRST, LAST, Blocks, pairs_of
from lineage_jax.kernels.flash_tpu import (
    Parts,
    compiler_params,
    hide,
    metadata,
    moved,
    product,
    roomy,
    step_of,
    told,
)
from lineage_jax.kernels.heads_tpu import Heads
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.typing import Array, Float

PARTS = {
    128: Parts(keys=1024, queries=1024, ahead=0, behind=0),
    256: Parts(keys=256, queries=512, ahead=1, behind=1),
}
"""By the width of a chip's matrix units: the fewest bundles (`experiments/LOG.md`). Where products
bound all, as on those of 128, parts cost more than they gain: weights are loaded more often."""

SMALL = dict(tile=512, chunk_bytes=2**21)
"""What fits in the 16 MiB of memory on the chip that a TPU v4 has; others have four times as much
and more."""


def limits(*, interpret: bool) -> dict[str, int]:
    """Of tiles and chunks (`cut`), on the chip that is compiled for."""
    return {} if roomy(interpret=interpret) else SMALL


def inner_products(
    blocks: Blocks, out: Float[Array, "..."], out_grad: Float[Array, "..."], *, interpret: bool
) -> Float[Array, "B H 1 T"]:
    """Of each position's attended values and their gradient, for each head."""
    b = blocks

    def kernel(out_ref, grad_ref, inner_ref):
        products = out_ref[...].astype(jnp.float32) * grad_ref[...].astype(jnp.float32)
        inner_ref[0, 0] = products.T.sum(0, keepdims=True)

    block = Heads(b.value_width).spec(b.rows, lambda n, h, i: (n, h, i))
    return pl.pallas_call(
        kernel,
        grid=(b.batch, b.heads, b.num_rows),
        in_specs=[block, block],
        out_specs=pl.BlockSpec((1, 1, 1, b.rows), lambda n, h, i: (n, h, 0, i)),
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
    reads: Intervals,
    query: Float[Array, "..."],
    keys: Float[Array, "..."],
    values: Float[Array, "..."],
    out_grad: Float[Array, "..."],
    log_sum: Float[Array, "B H 1 T"],
    inner: Float[Array, "B H 1 T"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Gradients of queries, keys and values, stored as these are, and in their types.

    Args:
      blocks: of the call.
      reads: of whole tiles of queries.
      query, keys, values, out_grad: stored, whole tiles of them.
      log_sum: of each query; large where no key is read, so that weights are 0.
      inner: what the gradient of each weight is compared with.
      interpret: computes on any device, slowly, as a TPU would.
    """
    b = blocks
    facts = jnp.concatenate((log_sum * math.log2(math.e), inner), axis=2)
    arrays = (query, keys, values, out_grad, facts)
    if b.chunks == 1:
        return chunk_backward(b, reads, None, None, *arrays, interpret=interpret)

    def body(of_query, chunk):
        of_query, *parts = chunk_backward(b, reads, chunk, of_query, *arrays, interpret=interpret)
        return of_query, parts

    zeros = jnp.zeros(query.shape, jnp.float32)
    of_query, parts = jax.lax.scan(body, zeros, jnp.arange(b.chunks, dtype=jnp.int32))
    # Positions are the second axis from the left, or from the right.
    of_keys, of_values = (
        jnp.moveaxis(x, 0, like.ndim - 2).reshape(*like.shape[: like.ndim - 2], -1, like.shape[-1])
        for x, like in zip(parts, (keys, values), strict=True)
    )
    of_keys, of_values = (x[..., : b.num_keys, :] for x in (of_keys, of_values))
    return (of_query / math.sqrt(b.width)).astype(query.dtype), of_keys, of_values


def chunk_backward(
    blocks: Blocks,
    reads: Intervals,
    chunk: Any,
    before: Any,
    query: Any,
    keys: Any,
    values: Any,
    out_grad: Any,
    facts: Any,
    *,
    interpret: bool,
) -> tuple[Any, Any, Any]:
    """What one chunk of the keys adds.

    Args:
      blocks: of the call.
      reads: of whole tiles of queries.
      chunk: its number; None if it is all keys.
      before: float32 gradients of the queries so far, without the scale of the scores; None if
        there is one chunk, whose gradients then are returned in their type and with the scale.
      query, keys, values, out_grad, interpret: of `backward`.
      facts: of each query's head, [B, H, 2, T]: its logarithmic sum to base 2, and `inner`.
    """
    b, size, lists = blocks, blocks.columns, reads.first.shape[0]
    scale, log2_e, whole = 1 / math.sqrt(b.width), math.log2(math.e), before is None
    parts_of = (PARTS[256] if interpret else PARTS[pltpu.get_tpu_info().mxu_column_size]).run
    pairs = pairs_of(b, reads) if whole else pairs_of(b, reads, chunk, b.chunk)
    given = told(pairs, reads)
    number = jnp.zeros(1, jnp.int32) if whole else jnp.reshape(chunk, (1,))

    def kernel(codes, number, reads_ref, query_ref, keys_ref, values_ref, *rest):
        grad_ref, facts_ref, *rest = rest
        before_ref, rest = (None, rest) if whole else (rest[0], rest[1:])
        of_query_ref, of_keys_ref, of_values_ref, query_sum, keys_sum, values_sum = rest
        head, p = pl.program_id(2), pl.program_id(3)
        step = step_of(lists, codes, pl.program_id(0), p)
        here_of = step.keys - number[0] * b.chunk  # of the tile of keys in the chunk

        @pl.when((head == 0) & (p == 0))
        def start():
            keys_sum[...] = jnp.zeros_like(keys_sum)
            values_sum[...] = jnp.zeros_like(values_sum)

        @pl.when(step.has(FIRST))
        def start_queries():
            query_sum[...] = jnp.zeros_like(query_sum)

        def tile(masked):
            turned = keys_ref[...].T

            def score(here, at):
                scores = product(keys_ref[here], query_ref[at], (1, 1))  # keys, queries
                return scores * (scale * log2_e), product(values_ref[here], grad_ref[at], (1, 1))

            def weigh(scored, here, at):
                scores, of_weights = scored
                if masked:
                    start = step.keys * size + here.start
                    scores = hide(scores, reads_ref[0, :, at], start)
                weights = jnp.exp2(scores - facts_ref[0, 0, :1, at])
                of_scores = weights * (of_weights - facts_ref[0, 0, 1:, at])
                return weights.astype(turned.dtype), of_scores.astype(turned.dtype)

            def add(weighed, here, at):
                weights, of_scores = weighed
                values_sum[here_of, :, here] += product(grad_ref[at], weights, (0, 1))
                keys_sum[here_of, :, here] += product(query_ref[at], of_scores, (0, 1))
                query_sum[:, at] += product(turned[:, here], of_scores, (1, 0))

            parts_of(b, score, weigh, add)

        step.meet(tile)

        @pl.when(step.has(LAST))
        def finish_queries():
            if before_ref is None:
                of_query_ref[...] = (query_sum[...] * scale).T.astype(of_query_ref.dtype)
            else:
                of_query_ref[...] = before_ref[...] + query_sum[...].T

        @pl.when((head == b.share - 1) & (p == pl.num_programs(3) - 1))
        def finish():
            for j in range(b.chunk):
                rows = slice(j * size, j * size + size)
                of_keys_ref[rows] = (keys_sum[j] * scale).T.astype(of_keys_ref.dtype)
                of_values_ref[rows] = values_sum[j].T.astype(of_values_ref.dtype)

    def of_queries(n, g, r, p, codes, number):
        return n, g * b.share + r, step_of(lists, codes, n, p).queries

    def of_keys(n, g, r, p, codes, number):
        return n, g, step_of(lists, codes, n, p).keys

    def of_chunk(n, g, r, p, codes, number):
        return n, g, 0

    def row(n, g, r, p, codes, number):
        return 0 if lists == 1 else n, 0, step_of(lists, codes, n, p).queries

    def head_row(n, g, r, p, codes, number):
        n, h, i = of_queries(n, g, r, p, codes, number)
        return n, h, 0, i

    of_key, of_value = Heads(b.width), Heads(b.value_width)
    queries = of_key.spec(b.rows, of_queries)
    tiles, kept = b.batch * b.heads * b.pairs // b.chunks, b.chunk * size
    of_query_type = query.dtype if whole else jnp.float32
    more = [] if whole else [before]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b.batch, b.groups, b.share, given.steps),
            in_specs=[
                *(pl.BlockSpec((1, 2, b.rows), row), queries),
                of_key.spec(size, of_keys),
                of_value.spec(size, of_keys),
                of_value.spec(b.rows, of_queries),
                pl.BlockSpec((1, 1, 2, b.rows), head_row),
                *([] if whole else [queries]),
            ],
            out_specs=[
                queries,
                of_key.spec(kept, of_chunk),
                of_value.spec(kept, of_chunk),
            ],
            scratch_shapes=[
                pltpu.VMEM((b.width, b.rows), jnp.float32),
                pltpu.VMEM((b.chunk, b.width, size), jnp.float32),
                pltpu.VMEM((b.chunk, b.value_width, size), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, of_query_type),
            jax.ShapeDtypeStruct(of_key.shape(b.batch, kept, b.groups), keys.dtype),
            jax.ShapeDtypeStruct(of_value.shape(b.batch, kept, b.groups), values.dtype),
        ],
        input_output_aliases={} if whole else {8: 0},
        compiler_params=compiler_params(2, 2),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles * b.rows * size * (3 * b.width + 2 * b.value_width),
            transcendentals=tiles * b.rows * size,
            bytes_accessed=2 * moved(b, query) + tiles * size * b.bytes_of_key(keys.dtype),
        ),
        metadata=metadata(b),
        name="flash_attention_backward",
        interpret=interpret,
    )(
        *(given.codes, number, given.reads, query, keys, values, out_grad, facts, *more),
    )
