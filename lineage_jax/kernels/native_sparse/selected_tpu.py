"""The selected branch on a TPU: each query's blocks are read from memory on the chip.

A block of keys is a small matrix, and the heads of one group are its few rows of queries. Of a few
queries all scores come first, by way of memory, and then what is attended: matrix units are loaded
fastest where nothing else is to be done.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import MASKED
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.chip_tpu import (
    LEAST,
    TILE,
    by_group,
    compiler_params,
    ungrouped,
)
from lineage_jax.kernels.native_sparse.config import NSAConfig
from lineage_jax.kernels.native_sparse.selected_blocks_tpu import (
    STRIP,
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
from lineage_jax.typing import Array, Float, Int

SCORED = ATTENDED = 8
"""Queries whose instructions the compiler mixes, as it computes scores and what is attended: while
products of one are waited for, another computes. With twice as many, registers do not suffice."""


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

    def kernel(blocks_ref, told_ref, order_ref, query_ref, keys_ref, values_ref, *refs):
        out_ref, log_ref, hidden_ref, scores_ref, weights_ref, *buffers = refs
        keys_come, keys_of = fetched(s, blocks_ref, keys_ref, *buffers[:2])
        values_come, values_of = fetched(s, blocks_ref, values_ref, *buffers[2:])

        def score(first, n):
            """Scores of a part of a query's blocks."""
            i, part = divided(n, s.parts)
            step = first * s.parts + n
            keys_come(step)
            laid = s.keys.laid(query_ref[first + i])
            for at, chunk in s.chunks:
                scores_ref[part, i, :, chunk] = s.keys.scores(laid, keys_of(step, at))

        def attend(first, i):
            """Of a query: gives the logarithm of its sum."""

            def masked(part, largest):
                for piece in s.pieces:
                    x = scores_ref[part, i, :, piece] * scale + hidden_ref[part, i, :, piece]
                    scores_ref[part, i, :, piece] = x
                    largest = x if largest is None else jnp.maximum(largest, x)
                return largest

            largest = several(s.parts, masked).max(1, keepdims=True)
            largest = jnp.maximum(largest, LEAST)

            def part(n, old):
                step = (first + i) * s.parts + n
                values_come(step)
                total = 0
                for piece in s.pieces:
                    weights = jnp.exp2(scores_ref[n, i, :, piece] - largest)
                    weights_ref[i, :, piece] = weights.astype(s.dtype)
                    total += weights
                sums = [
                    s.values.sums(weights_ref[i, :, chunk], values_of(step, at))
                    for at, chunk in s.chunks
                ]
                found = total.sum(1, keepdims=True), *map(sum, zip(*sums, strict=True))
                return tuple(map(jnp.add, old, found)) if old else found

            total, *sums = several(s.parts, part)
            some, attended = total > 0, s.values.whole(sums)
            out_ref[first + i] = (attended / jnp.where(some, total, 1)).astype(out_ref.dtype)
            return jnp.where(some, largest * math.log(2) + jnp.log(total), MASKED)

        def strip(first):
            hide(s, first, told_ref, order_ref, hidden_ref)
            mixed(STRIP * s.parts, SCORED, lambda n: score(first, n))

            def attend_some(m, _):
                logs = log_ref[...]
                at = jax.lax.broadcasted_iota(jnp.int32, logs.shape, 1)
                for i in range(ATTENDED):
                    i += m * ATTENDED
                    logs = jnp.where(at == first + i, attend(first, i), logs)
                log_ref[...] = logs

            jax.lax.fori_loop(0, STRIP // ATTENDED, attend_some, None)

        mixed(TILE // STRIP, 1, lambda i: strip(i * STRIP))

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
        scratch_shapes=[
            hidden_buffer(s),
            pltpu.VMEM((s.parts, STRIP, s.share, s.together * s.size), jnp.float32),
            pltpu.VMEM((STRIP, s.share, s.together * s.size), s.dtype),
            *buffers(s, *s.stored),
        ],
        compiler_params=compiler_params(2, 1),
        cost_estimate=s.cost(s.width + s.value_width, passes=1),
        name="selected_forward",
        interpret=interpret,
    )(
        *told(blocks, reach, keys.shape[1], s),
        by_group(query, s.groups),
        s.keys.stored(keys),
        s.values.stored(values),
    )
    return ungrouped(out, query.shape[1]), of_heads(log_sum, query.shape[1])


def of_heads(sums: Float[Array, "B G R S"], length: int) -> Float[Array, "B H T"]:
    """Numbers of each query head, at the first positions."""
    return sums.reshape(sums.shape[0], -1, sums.shape[-1])[..., :length]


def mixed(count: int, each: int, one: Callable[[Any], None]) -> None:
    """Does one thing after another, so many in a loop's body that their instructions mix."""

    def some(i, _):
        for n in range(each):
            one(i * each + n)

    jax.lax.fori_loop(0, count // each, some, None)


def several(count: int, one: Callable[[Any, Any], Any]) -> Any:
    """What comes of one step after another, each of which takes what came before: None at first."""
    first = one(0, None)
    if count == 1:
        return first
    return jax.lax.fori_loop(0, count - 1, lambda i, before: one(i + 1, before), first)


def divided(n: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder."""
    return (n, 0) if by == 1 else (jax.lax.div(n, by), jax.lax.rem(n, by))
