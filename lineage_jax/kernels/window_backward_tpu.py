"""Attention to a window on a TPU, backward: gradients by the same tiles as `window_tpu`.

A tile of queries meets its keys in one step. Gradients of keys and values are added up on the chip,
in a ring of as many as a tile may read, and written once no later tile reads them.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.bands import LATE, MEET, TILE_AT, WIDE, WRITE, Band, walk
from lineage_jax.kernels.blocks import LANES, MASKED, stored, unstored
from lineage_jax.kernels.flash_tpu import (
    compiler_params,
    counted,
    hide,
    in_turn,
    product,
)
from lineage_jax.kernels.heads_tpu import Heads
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.window_tpu import padded, pairs, tile
from lineage_jax.typing import Array, Float

AHEAD, BEHIND = 1, 1
"""Of `window_tpu`: more of either does not take fewer bundles (`experiments/LOG.md`)."""


def window_backward(
    band: Band,
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    reads: Intervals,
    out: Float[Array, "B T H E"],
    log_sum: Float[Array, "B H T"],
    out_grad: Float[Array, "B T H E"],
    *,
    sum_grad: Float[Array, "B H T"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S G K"], Float[Array, "B S G E"]]:
    """As `flash.flash_backward`, of queries that read a band.

    Args:
      band: of the call, with one tile in a step.
      query, keys, values, reads, interpret: of `window_forward`.
      out, log_sum: its results.
      out_grad, sum_grad: their gradients; the sums have none if not given.
    """
    b, lists = band, reads.first.shape[0]
    length, num_keys = query.shape[1], keys.shape[1]
    scale, log2_e = 1 / math.sqrt(b.width), math.log2(math.e)
    of_query, of_out = Heads(b.width, b.together), Heads(b.value_width, b.together)
    splits, ring, here = b.share // b.together, b.wide // LANES, slice(0, LANES)
    reads = b.padded(reads)
    steps = walk(b, reads)
    listed = steps.codes.shape[1]

    def kernel(codes, blocks, reads_ref, query_ref, keys_ref, values_ref, *refs):
        out_ref, grad_ref, facts_ref, of_query_ref, of_keys_ref, of_values_ref, *refs = refs
        keys_sum, values_sum, hidden_ref = refs
        p = pl.program_id(2)
        at = number(pl.program_id(0), p)
        code, block = codes[at], blocks[at]

        @pl.when(p == 0)
        def start():
            keys_sum[...] = jnp.zeros_like(keys_sum)
            values_sum[...] = jnp.zeros_like(values_sum)

        def meet(columns):
            late = (code & LATE) // LATE  # rows of lanes
            near = pl.ds(pl.multiple_of(late * LANES, LANES), columns)
            slots = [jax.lax.rem(block + late + i, ring) for i in range(columns // LANES)]
            first = (block + late) * LANES
            hidden_ref[:columns] = hide(jnp.zeros((columns, LANES)), reads_ref[0], first)
            turned = keys_ref[near].T

            def facts(row, heads):
                return jnp.concatenate([facts_ref[row, h : h + 1] for h in heads], 1)

            def read(of, ref, heads):
                return jnp.concatenate([ref[of.at(h, here)] for h in heads])

            def score(heads):
                queries, grads = read(of_query, query_ref, heads), read(of_out, grad_ref, heads)
                scores = product(keys_ref[near], queries, (1, 1)) * (scale * log2_e)
                of_weights = product(values_ref[near], grads, (1, 1))  # keys, queries of the heads
                return scores, of_weights, queries.T, grads.T

            def weigh(scored, heads):
                scores, of_weights, queries, grads = scored
                outs = read(of_out, out_ref, heads).T
                inner = outs.astype(jnp.float32) * grads.astype(jnp.float32)
                inner = inner.sum(0, keepdims=True) - facts(1, heads)
                scores += jnp.concatenate([hidden_ref[:columns]] * len(heads), 1)
                weights = jnp.exp2(scores - facts(0, heads))
                of_scores = weights * (of_weights - inner)
                weights, of_scores = (x.astype(turned.dtype) for x in (weights, of_scores))
                return weights, of_scores, queries, grads

            def add(weighed, heads):
                weights, of_scores, queries, grads = weighed
                found = product(turned, of_scores, (1, 0)) * scale  # K, queries of the heads
                for i, head in enumerate(heads):
                    one = found[:, tile(i)].T
                    of_query_ref[of_query.at(head, here)] = one.astype(of_query_ref.dtype)
                of_keys = product(queries, of_scores, (1, 1))  # K, keys
                of_values = product(grads, weights, (1, 1))
                for i, slot in enumerate(slots):
                    keys_sum[slot] += of_keys[:, tile(i)]
                    values_sum[slot] += of_values[:, tile(i)]

            parts = [(heads,) for heads in pairs(b.together)]
            in_turn(parts, score, weigh, add, AHEAD, BEHIND)

        if b.wide == b.columns:
            pl.when(code & MEET != 0)(lambda: meet(b.columns))
        else:
            pl.when(code & (MEET | WIDE) == MEET)(lambda: meet(b.columns))
            pl.when(code & (MEET | WIDE) == MEET | WIDE)(lambda: meet(b.wide))

        @pl.when(code & WRITE != 0)
        def write():
            slot = jax.lax.rem(block, ring)
            of_keys_ref[...] = (keys_sum[slot] * scale).T.astype(of_keys_ref.dtype)
            of_values_ref[...] = values_sum[slot].T.astype(of_values_ref.dtype)
            keys_sum[slot] = jnp.zeros_like(keys_sum[slot])
            values_sum[slot] = jnp.zeros_like(values_sum[slot])

    def number(n, p):
        return p if lists == 1 else n * listed + p

    def queries_at(n, h, p, codes, blocks):
        return n, h, codes[number(n, p)] >> TILE_AT

    def facts_at(n, h, p, codes, blocks):
        return n, 0, h, 0, codes[number(n, p)] >> TILE_AT

    def reads_at(n, h, p, codes, blocks):
        return 0 if lists == 1 else n, 0, codes[number(n, p)] >> TILE_AT

    def keys_at(n, h, p, codes, blocks):
        first = jnp.minimum(blocks[number(n, p)], b.num_keys // LANES - ring)
        return n, h // splits, first * LANES

    def written_at(n, h, p, codes, blocks):
        return n, h, blocks[number(n, p)]

    # Where nothing is read, and in padding, there are no weights.
    log_sum = jnp.where(log_sum > MASKED / 2, log_sum * log2_e, -MASKED)
    sum_grad = jnp.zeros_like(log_sum) if sum_grad is None else sum_grad
    parts, ends = b.heads // b.together, ((0, 0), (0, 0), (0, b.length - length))
    log_sum = jnp.pad(log_sum, ends, constant_values=-MASKED)
    facts = jnp.stack((log_sum, jnp.pad(sum_grad, ends)), axis=1)
    facts = facts.reshape(b.batch, 2, parts, b.together, b.length)
    queries, outs, grads = (
        of.stored(padded(x, b.length))
        for of, x in ((of_query, query), (of_out, out), (of_out, out_grad))
    )
    near = [padded(x, b.num_keys) for x in (keys, values)]
    widths, types = (b.width, b.value_width), (keys.dtype, values.dtype)
    of_query_block, of_out_block = (of.spec(LANES, queries_at) for of in (of_query, of_out))
    grad_of_query, *grads_of_keys = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b.batch, parts, steps.steps),
            in_specs=[
                pl.BlockSpec((1, 2, LANES), reads_at),
                of_query_block,
                *(Heads(x.shape[-1]).spec_from(b.wide, keys_at) for x in near),
                *(of_out_block, of_out_block),
                pl.BlockSpec((None, 2, None, b.together, LANES), facts_at),
            ],
            out_specs=[
                of_query_block,
                *(Heads(width).spec(LANES, written_at) for width in widths),
            ],
            scratch_shapes=[
                *(pltpu.VMEM((ring, width, LANES), jnp.float32) for width in widths),
                pltpu.VMEM((b.wide, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, query.dtype),
            *(
                jax.ShapeDtypeStruct(
                    Heads(width).shape(b.batch, b.num_keys, parts),
                    dtype if splits == 1 else jnp.float32,
                )
                for width, dtype in zip(widths, types, strict=True)
            ),
        ],
        compiler_params=compiler_params(2, checked=False),
        cost_estimate=pl.CostEstimate(
            flops=2 * b.scores * (3 * b.width + 2 * b.value_width),
            transcendentals=b.scores,
            bytes_accessed=2 * (queries.nbytes + outs.nbytes) + b.bytes_of_keys(near),
        ),
        name="window_backward",
        interpret=interpret,
    )(
        *(steps.codes.ravel(), steps.blocks.ravel(), counted(reads), queries),
        *(*map(stored, near), outs, grads, facts),
    )
    of_keys, of_values = (
        unstored(x, width)[:, :num_keys].reshape(b.batch, num_keys, b.groups, splits, width).sum(3)
        for x, width in zip(grads_of_keys, widths, strict=True)
    )
    of_queries = of_query.unstored(grad_of_query)[:, :length]
    return of_queries, of_keys.astype(keys.dtype), of_values.astype(values.dtype)
