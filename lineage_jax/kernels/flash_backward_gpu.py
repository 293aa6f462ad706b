"""Flash attention for GPU, backward: the weights are computed again from their logarithmic sums.

One kernel has the programs of the forward pass and finds the gradients of queries. In the other a
program has a tile of keys and meets the tiles of queries that read any of them, of one head of the
group after another. Nothing is added to memory by two programs, so results are the same each time.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lineage_jax.kernels.blocks import MASKED, Blocks, padded_reads
from lineage_jax.kernels.flash_gpu import specs, told_specs
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.tiles_gpu import (
    Arithmetic,
    Tiles,
    cut,
    filled,
    keys_met,
    meet,
    positions,
    queries_met,
    read,
    seen,
    whole,
    write,
    zeros,
)
from lineage_jax.typing import Array, Float

QUERIES = {2: Tiles(128, 64, 8, 2), 4: Tiles(32, 32, 8, 1)}
KEYS = {2: Tiles(64, 64, 8, 2), 4: Tiles(32, 32, 8, 1)}
"""For gradients of queries, and of keys and values, by the bytes of a number."""
PROGRAMS = 512
"""With fewer, the heads of a group are shared among several: an H200 runs some 264 at once."""


def flash_backward(
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
    """The gradients of queries, keys and values, from what `flash_forward` took and returned.

    Args:
      query, keys, values, reads, interpret: of `flash_forward`.
      out, log_sum: its results.
      out_grad, sum_grad: their gradients; the sums have none if not given.
    """
    inner = jnp.einsum("bthe,bthe->bht", out.astype(jnp.float32), out_grad.astype(jnp.float32))
    if sum_grad is not None:
        inner -= sum_grad
    # Where nothing is read, there are no weights.
    log_sum = jnp.where(log_sum > MASKED / 2, log_sum * math.log2(math.e), -MASKED)
    given = query, keys, values, out_grad.astype(query.dtype), reads, log_sum, inner
    return (
        of_queries(*given, interpret=interpret),
        *of_stored(*given, interpret=interpret),
    )


def weights_and_gradients(unit, scores, of_weights, log_sum, inner, here, scale):
    """Weights, and the gradients of scores, of products of heads and of gradients with values."""
    weights = unit.powers(scores, scale * math.log2(math.e), log_sum)
    if here is not None:
        weights = jnp.where(here, weights, 0)
    return weights, weights * (of_weights - inner)


def bytes_of_pair(query: Float[Array, "B T H K"], values: Float[Array, "B S G E"]) -> int:
    """Of a head of keys and one of values, or one of queries and its gradient."""
    return (whole(query.shape[-1]) + whole(values.shape[-1])) * query.dtype.itemsize


def prepared(b: Blocks, query, keys, values, out_grad, log_sum, inner):
    """Whole tiles of all; the queries of padding have no weights."""
    ends = ((0, 0), (0, 0), (0, b.length - query.shape[1]))
    log_sum = jnp.pad(log_sum, ends, constant_values=-MASKED)
    heads = filled(query, b.length), filled(keys, b.num_keys), filled(values, b.num_keys)
    return *heads, filled(out_grad, b.length), log_sum, jnp.pad(inner, ends)


def of_queries(
    query, keys, values, out_grad, reads, log_sum, inner, *, interpret: bool
) -> Float[Array, "B T H K"]:
    """The gradient of queries."""
    unit, each = Arithmetic(interpret), bytes_of_pair(query, values)
    tiles = QUERIES[query.dtype.itemsize]
    tiles = tiles.fitted(each, tiles.stages * each)
    b, scale = cut(query, keys, values, tiles), 1 / math.sqrt(query.shape[-1])

    def flash_attention_backward_queries(met_ref, reads_ref, query_ref, keys_ref, *refs):
        values_ref, grad_ref, log_ref, inner_ref, of_query_ref = refs
        heads, grads = read(query_ref, slice(None)), read(grad_ref, slice(None))
        ends = (reads_ref[0][:, None], reads_ref[1][:, None])
        facts = log_ref[...][:, None], inner_ref[...][:, None]

        def tile(masked):
            def add(j, _, total):
                at = pl.ds(j * b.columns, b.columns)
                near = read(keys_ref, at)
                here = None
                if masked:
                    here = seen(ends, positions(j * b.columns, b.columns)[None])
                products = (
                    unit.inner_products(heads, near),
                    unit.inner_products(grads, read(values_ref, at)),
                )
                _, of_scores = weights_and_gradients(unit, *products, *facts, here, scale)
                return unit.add_products(total, of_scores, near)

            return add

        total = meet(met_ref, zeros(b.rows, b.width), tile)
        write(of_query_ref, tuple(x * scale for x in total), slice(None))

    query_spec, keys_spec, values_spec, grad_spec, sums_spec = specs(b)
    given = padded_reads(b, reads)
    found = pl.pallas_call(
        flash_attention_backward_queries,
        grid=(b.share, b.num_rows, b.groups, b.batch),
        in_specs=[
            *told_specs(b, given),
            *(query_spec, keys_spec, values_spec, grad_spec, sums_spec, sums_spec),
        ],
        out_specs=query_spec,
        out_shape=jax.ShapeDtypeStruct((b.batch, b.length, b.heads, b.width), query.dtype),
        compiler_params=tiles.params,
        interpret=interpret,
        name="flash_attention_backward_queries",
    )(
        keys_met(b, given).stacked(),
        jnp.stack(given, axis=1),
        *prepared(b, query, keys, values, out_grad, log_sum, inner),
    )
    return found[:, : query.shape[1], :, : query.shape[-1]]


def of_stored(
    query, keys, values, out_grad, reads, log_sum, inner, *, interpret: bool
) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G E"]]:
    """The gradients of keys and of values."""
    unit, pair = Arithmetic(interpret), bytes_of_pair(query, values)
    tiles = KEYS[query.dtype.itemsize]
    tiles = tiles.fitted(tiles.stages * pair, pair)
    b, scale = cut(query, keys, values, tiles), 1 / math.sqrt(query.shape[-1])
    splits = shares(b)
    each = b.share // splits

    def flash_attention_backward_keys(met_ref, reads_ref, query_ref, keys_ref, *refs):
        values_ref, grad_ref, log_ref, inner_ref, of_keys_ref, of_values_ref = refs
        near, attended = read(keys_ref, slice(None)), read(values_ref, slice(None))
        here = positions(pl.program_id(0) * b.columns, b.columns)[:, None]

        def tile(masked):
            def add(i, r, sums):
                at = pl.ds(i * b.rows, b.rows)
                heads, grads = read(query_ref, at, r), read(grad_ref, at, r)
                facts = log_ref[r, at][None], inner_ref[r, at][None]
                some = None
                if masked:
                    some = seen((reads_ref[0, at][None], reads_ref[1, at][None]), here)
                products = unit.inner_products(near, heads), unit.inner_products(attended, grads)
                weights, of_scores = weights_and_gradients(unit, *products, *facts, some, scale)
                of_values = unit.add_products(sums[1], weights, grads)
                return unit.add_products(sums[0], of_scores, heads), of_values

            return add

        start = zeros(b.columns, b.width), zeros(b.columns, b.value_width)
        of_keys, of_values = meet(met_ref, start, tile, heads=each)
        write(of_keys_ref, tuple(x * scale for x in of_keys), slice(None))
        write(of_values_ref, of_values, slice(None))

    def queries(width):  # all of some heads of a group
        shape = (None, b.length, each, width)
        return pl.BlockSpec(shape, lambda j, z, g, n: (n, 0, g * splits + z, 0))

    def stored(width):
        return pl.BlockSpec((None, b.columns, None, width), lambda j, z, g, n: (n, j, g, 0))

    def added(width):
        shape = (None, None, b.columns, None, width)
        return pl.BlockSpec(shape, lambda j, z, g, n: (z, n, j, g, 0))

    sums = pl.BlockSpec((None, each, b.length), lambda j, z, g, n: (n, g * splits + z, 0))
    given = padded_reads(b, reads)
    alone = given.first.shape[0] == 1
    shape = (splits, b.batch, b.num_keys, b.groups)
    dtype = keys.dtype if splits == 1 else jnp.float32
    found = pl.pallas_call(
        flash_attention_backward_keys,
        grid=(b.num_columns, splits, b.groups, b.batch),
        in_specs=[
            pl.BlockSpec((None, None, 4), lambda j, z, g, n: (0 if alone else n, j, 0)),
            pl.BlockSpec((None, 2, b.length), lambda j, z, g, n: (0 if alone else n, 0, 0)),
            *(queries(b.width), stored(b.width), stored(b.value_width), queries(b.value_width)),
            *(sums, sums),
        ],
        out_specs=[added(b.width), added(b.value_width)],
        out_shape=[jax.ShapeDtypeStruct((*shape, x), dtype) for x in (b.width, b.value_width)],
        compiler_params=tiles.params,
        interpret=interpret,
        name="flash_attention_backward_keys",
    )(
        queries_met(b, given).stacked(),
        jnp.stack(given, axis=1),
        *prepared(b, query, keys, values, out_grad, log_sum, inner),
    )
    of_keys, of_values = (x[0] if splits == 1 else x.sum(0) for x in found)
    length = keys.shape[1]
    return (
        of_keys[:, :length, :, : keys.shape[-1]].astype(keys.dtype),
        of_values[:, :length, :, : values.shape[-1]].astype(values.dtype),
    )


def shares(blocks: Blocks) -> int:
    """How many programs have the heads of a group that read the same keys: as few as are enough."""
    programs = blocks.num_columns * blocks.groups * blocks.batch
    divisors = [n for n in range(1, blocks.share + 1) if blocks.share % n == 0]
    return next((n for n in divisors if n * programs >= PROGRAMS), blocks.share)
