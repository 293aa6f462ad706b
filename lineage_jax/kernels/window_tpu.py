"""Attention to a window on a TPU, forward: a tile of queries meets all its keys in one step.

So softmax is over all that there is: one maximum, one sum, and nothing is weighed again. A step
takes several heads of queries that read one head of keys, and the scores of the next ones are begun
before those of one are exponentiated. What is hidden from a tile is found out once for its heads.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.bands import Band, band_of, meeting
from lineage_jax.kernels.blocks import LANES, MASKED, Expected, stored
from lineage_jax.kernels.flash_tpu import (
    LOWEST,
    compiler_params,
    counted,
    hide,
    in_turn,
    product,
    roomy,
)
from lineage_jax.kernels.heads_tpu import Heads
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.typing import Array, Float

PAIR = 2
"""Heads that meet their keys in one product: where matrix units are 256 wide, two tiles of queries
fill them, and others lose nothing."""
AHEAD, BEHIND = 2, 1
"""Pairs of heads whose scores are computed before one is exponentiated, and that are exponentiated
before one is multiplied by values: the fewest bundles (`experiments/LOG.md`)."""
SMALL = 512
"""Keys in a window that fit, at most, in the 16 MiB of memory on the chip that a TPU v4 has."""


def band_here(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    reads: Intervals,
    expected: Expected,
    *,
    backward: bool = False,
    interpret: bool = False,
) -> Band | None:
    """`band_of` a call; None also where that is nothing for the chip that is compiled for.

    That is float32, where each product is six, so that all heads of a step together would take
    minutes to compile; and where a step does not fit on the chip.
    """
    shapes = query.shape, keys.shape, values.shape[-1], expected
    band = band_of(*shapes, lists=reads.first.shape[0], backward=backward)
    if band is None or interpret:
        return band
    fits = roomy(interpret=interpret) or band.window <= SMALL
    return band if fits and query.dtype.itemsize <= 2 else None


def window_forward(
    band: Band,
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    reads: Intervals,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """As `flash.flash_forward`, of queries that read a band.

    Args:
      band: of the call.
      query, keys, values: projected heads.
      reads: the keys that each query reads.
      interpret: computes on any device, slowly, as a TPU would.
    """
    b, lists, length = band, reads.first.shape[0], query.shape[1]
    scale = math.log2(math.e) / math.sqrt(b.width)  # for powers of two, which are what a TPU has
    of_query, of_out = Heads(b.width, b.together), Heads(b.value_width, b.together)
    splits = b.share // b.together
    parts = [(j, heads) for j in range(b.tiles) for heads in pairs(b.together)]
    reads = b.padded(reads)
    tiles = meeting(b, reads)

    def kernel(bases, begins, wide, *refs):
        reads_ref, query_ref, keys_ref, values_ref, out_ref, log_ref, hidden_ref = refs
        step = pl.program_id(2) + (0 if lists == 1 else pl.program_id(0) * b.steps)

        def meet(columns):
            at, turned = [], []
            for j in range(b.tiles):
                begin = begins[step * b.tiles + j]
                start = pl.multiple_of(begin - bases[step], LANES)
                at.append(pl.ds(start, columns))
                turned.append(values_ref[at[j]].T)
                hidden = hide(jnp.zeros((columns, LANES)), reads_ref[0, :, tile(j)], begin)
                hidden_ref[j, :columns] = hidden

            def score(j, heads):
                query = jnp.concatenate([query_ref[of_query.at(h, tile(j))] for h in heads])
                return product(keys_ref[at[j]], query, (1, 1)) * scale  # keys, queries of the heads

            def weigh(scores, j, heads):
                scores += jnp.concatenate([hidden_ref[j, :columns]] * len(heads), 1)
                largest = scores.max(0, keepdims=True)
                weights = jnp.exp2(scores - largest)
                total = weights.sum(0, keepdims=True)
                return largest, total, weights.astype(values_ref.dtype)

            def add(weighed, j, heads):
                largest, total, weights = weighed
                any_key = jnp.concatenate([reads_ref[0, 1:, tile(j)] > LOWEST] * len(heads), 1)
                out = product(turned[j], weights, (1, 0))
                out = jnp.where(any_key, out / total, 0)
                log_sum = largest * math.log(2) + jnp.log(total)
                log_sum = jnp.where(any_key, log_sum, MASKED)
                for n, head in enumerate(heads):
                    one = out[:, tile(n)].T
                    out_ref[of_out.at(head, tile(j))] = one.astype(out_ref.dtype)
                    log_ref[head, tile(j)] = log_sum[0, tile(n)]

            in_turn(parts, score, weigh, add, AHEAD, BEHIND)

        if b.wide == b.columns:
            meet(b.columns)
        else:
            pl.when(wide[step] == 0)(lambda: meet(b.columns))
            pl.when(wide[step] != 0)(lambda: meet(b.wide))

    def queries_at(n, g, i, c, *_):
        return n, g * splits + c, i

    def keys_at(n, g, i, c, bases, *_):
        return n, g, bases[i if lists == 1 else n * b.steps + i]

    def reads_at(n, g, i, c, *_):
        return 0 if lists == 1 else n, 0, i

    def log_at(n, g, i, c, *_):
        return n, g * splits + c, 0, i

    near = [padded(x, b.num_keys) for x in (keys, values)]
    out_shape = of_out.shape(b.batch, b.length, b.heads)
    queries = of_query.stored(padded(query, b.length))
    out_bytes = math.prod(out_shape) * values.dtype.itemsize
    out, log_sum = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b.batch, b.groups, b.steps, splits),
            in_specs=[
                pl.BlockSpec((1, 2, b.rows), reads_at),
                of_query.spec(b.rows, queries_at),
                *(Heads(x.shape[-1]).spec_from(b.fetched, keys_at) for x in near),
            ],
            out_specs=[
                of_out.spec(b.rows, queries_at),
                pl.BlockSpec((None, None, b.together, b.rows), log_at),
            ],
            scratch_shapes=[pltpu.VMEM((b.tiles, b.wide, LANES), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(out_shape, values.dtype),
            jax.ShapeDtypeStruct((b.batch, b.groups * splits, b.together, b.length), jnp.float32),
        ],
        compiler_params=compiler_params(3, checked=False),
        cost_estimate=pl.CostEstimate(
            flops=2 * b.scores * (b.width + b.value_width),
            transcendentals=b.scores,
            bytes_accessed=queries.nbytes + out_bytes + b.bytes_of_keys(near),
        ),
        name="window_forward",
        interpret=interpret,
    )(*(x.astype(jnp.int32).ravel() for x in tiles), counted(reads), queries, *map(stored, near))
    log_sum = log_sum.reshape(b.batch, b.heads, b.length)
    return of_out.unstored(out)[:, :length], log_sum[..., :length]


def tile(number: int) -> slice:
    """A tile of queries, or of lanes."""
    return slice(number * LANES, (number + 1) * LANES)


def pairs(count: int) -> list[range]:
    """So many heads, PAIR by PAIR."""
    return [range(n, min(n + PAIR, count)) for n in range(0, count, PAIR)]


def padded(x: Float[Array, "B T H K"], length: int) -> Float[Array, "B S H K"]:
    """With as many positions more as there are too few."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
