"""Flash attention for TPU, forward: what `lineage_jax.kernels.flash` prepares comes here.

A TPU takes the steps of a grid in order, so what many steps add up to stays in its memory on the
chip: a tile of queries meets its keys in turn. The list of steps is made before, from what each
query reads, and given to the kernel as scalars; what nobody reads is neither fetched nor computed.

Scores are computed keys by queries, so that what there is one of for each query is a row, and a
maximum or a sum over keys is taken between registers, not within them. A tile is computed in parts,
and products of the next parts begin before the softmax of one ends: both keep their units busy.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import (
    FIRST,
    HIDDEN,
    KEYS_AT,
    LANES,
    LAST,
    MASKED,
    QUERIES_AT,
    READ,
    Blocks,
    Pairs,
)
from lineage_jax.kernels.heads_tpu import Heads
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.typing import Array, Float, Int

LOWEST = jnp.iinfo(jnp.int32).min
VMEM_BYTES = 64 * 2**20
"""Of memory on the chip that a kernel may take; a TPU v5p has so much for each core."""


class Parts(NamedTuple):
    """How a tile of scores is computed: in parts, one after another.

    Attributes:
      keys, queries: in a part at most.
      ahead: parts whose first products are computed before one is exponentiated.
      behind: parts that are exponentiated before one is multiplied again.
    """

    keys: int
    queries: int
    ahead: int
    behind: int

    def run(self, blocks: Blocks, begin: Callable, middle: Callable, end: Callable) -> None:
        """`end(middle(begin(*part), *part), *part)` of all parts, some at a time.

        A part is a slice of the keys of a tile and one of its queries.
        """
        rows, columns = within(blocks.rows, self.queries), within(blocks.columns, self.keys)
        parts = [(a, b) for a in columns for b in rows]
        in_turn(parts, begin, middle, end, self.ahead, self.behind)


def in_turn(
    parts: Sequence[tuple[Any, ...]],
    begin: Callable,
    middle: Callable,
    end: Callable,
    ahead: int,
    behind: int,
) -> None:
    """`end(middle(begin(*part), *part), *part)` of all parts, some at a time, as `Parts` says."""
    begun, ready = [begin(*part) for part in parts[:ahead]], list[Any]()
    for n, part in enumerate(parts):
        begun += [begin(*later) for later in parts[n + ahead :][:1]]
        ready.append(middle(begun[n], *part))
        if n >= behind:
            end(ready[n - behind], *parts[n - behind])
    for n in range(max(0, len(parts) - behind), len(parts)):
        end(ready[n], *parts[n])


def within(size: int, most: int) -> list[slice]:
    """Slices of equal size, whole rows of lanes, that fill a tile."""
    sizes = range(LANES, min(size, most) + 1, LANES)
    each = max(n for n in sizes if size % n == 0)
    return [slice(start, start + each) for start in range(0, size, each)]


FORWARD = Parts(keys=512, queries=256, ahead=3, behind=1)
"""The fewest bundles of those that were tried at widths of 192 and 128, on v5e and v6e
(`experiments/LOG.md`)."""


class Told(NamedTuple):
    """What a kernel is told of who reads what; rows of the batch may have one answer in common.

    Attributes:
      codes, steps: of `Pairs`.
      reads: the first key that each query reads, and how many, [#B, 2, T]: int32, with the lowest
        number added, as `hide` takes them.
    """

    codes: Any
    steps: Any
    reads: Any


def told(pairs: Pairs, reads: Intervals) -> Told:
    """In the form that kernels take."""
    return Told(*pairs, counted(reads))


def counted(reads: Intervals) -> Int[Array, "B 2 T"]:
    """The first key that each query reads, and how many, as `hide` takes them."""
    count = jnp.maximum(reads.last - reads.first + 1, 0)
    return jnp.stack((reads.first, count), axis=1) + LOWEST


def hide(scores: Any, reads: Any, start: Any) -> Any:
    """Scores, keys by queries, MASKED where a query does not read a key.

    A key is read if key - first, taken as a number without a sign, is less than the count: one
    comparison for both ends. With the lowest number added on either side signs may stay.

    Args:
      scores: of keys one after another.
      reads: of `Told`, of the queries.
      start: the first of the keys.
    """
    keys = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) + start
    return jnp.where(keys - reads[:1] < reads[1:], scores, MASKED)


class Step(NamedTuple):
    """What a step of the grid is to do."""

    code: Any

    @property
    def keys(self) -> Any:
        """The tile of keys."""
        return (self.code >> KEYS_AT) & ((1 << (QUERIES_AT - KEYS_AT)) - 1)

    @property
    def queries(self) -> Any:
        """The tile of queries."""
        return self.code >> QUERIES_AT

    def has(self, flag: int) -> Any:
        """Whether a flag is set."""
        return self.code & flag != 0

    def meet(self, tile: Callable[[bool], None]) -> None:
        """Calls `tile(masked)` if any score is read; masked if some are hidden."""
        seen = self.code & (READ | HIDDEN)
        pl.when(seen == READ)(lambda: tile(False))
        pl.when(seen == READ | HIDDEN)(lambda: tile(True))


def step_of(lists: int, codes: Any, row: Any, number: Any) -> Step:
    """A step of a row of the batch, if there is a list for each row or one for all."""
    return Step(codes[number if lists == 1 else row * (codes.shape[0] // lists) + number])


def product(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """a b, contracted over one axis each, accumulated in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def forward(
    blocks: Blocks,
    told: Told,
    query: Float[Array, "..."],
    keys: Float[Array, "..."],
    values: Float[Array, "..."],
    *,
    interpret: bool,
) -> tuple[Float[Array, "..."], Float[Array, "B H 1 T"]]:
    """Attended values, stored as heads are, and logarithmic sums; MASKED of what reads nothing."""
    b, lists = blocks, told.reads.shape[0]
    scale = math.log2(math.e) / math.sqrt(b.width)  # for powers of two, which are what a TPU has

    def kernel(codes, reads_ref, query_ref, keys_ref, values_ref, *rest):
        out_ref, log_ref, largest_ref, sum_ref, total_ref = rest
        step = step_of(lists, codes, pl.program_id(0), pl.program_id(2))

        @pl.when(step.has(FIRST))
        def start():
            largest_ref[...] = jnp.full_like(largest_ref, MASKED)
            sum_ref[...] = jnp.zeros_like(sum_ref)
            total_ref[...] = jnp.zeros_like(total_ref)

        def tile(masked):
            turned = values_ref[...].T

            def score(here, at):
                return product(keys_ref[here], query_ref[at], (1, 1)) * scale  # keys, queries

            def weigh(scores, here, at):
                if masked:
                    start = step.keys * b.columns + here.start
                    scores = hide(scores, reads_ref[0, :, at], start)
                old = largest_ref[:, at]
                largest = jnp.maximum(old, scores.max(0, keepdims=True))
                weights, keep = jnp.exp2(scores - largest), jnp.exp2(old - largest)
                largest_ref[:, at] = largest
                sum_ref[:, at] = sum_ref[:, at] * keep + weights.sum(0, keepdims=True)
                return weights.astype(turned.dtype), keep

            def add(weighed, here, at):
                weights, keep = weighed
                new = product(turned[:, here], weights, (1, 0))
                total_ref[:, at] = total_ref[:, at] * keep + new

            FORWARD.run(b, score, weigh, add)

        step.meet(tile)

        @pl.when(step.has(LAST))
        def finish():
            any_key = reads_ref[0, 1:] > LOWEST
            out = jnp.where(any_key, total_ref[...] / sum_ref[...], 0)
            out_ref[...] = out.T.astype(out_ref.dtype)
            log_sum = largest_ref[...] * math.log(2) + jnp.log(sum_ref[...])
            log_ref[0, 0] = jnp.where(any_key, log_sum, MASKED)

    def of_queries(n, h, p, codes):
        return n, h, step_of(lists, codes, n, p).queries

    def of_keys(n, h, p, codes):
        return n, h // b.share, step_of(lists, codes, n, p).keys

    def row(n, h, p, codes):
        return 0 if lists == 1 else n, 0, step_of(lists, codes, n, p).queries

    def head_row(n, h, p, codes):
        return n, h, 0, step_of(lists, codes, n, p).queries

    of_key, of_value = Heads(b.width), Heads(b.value_width)
    tiles = b.batch * b.heads * b.pairs
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b.batch, b.heads, told.steps),
            in_specs=[
                pl.BlockSpec((1, 2, b.rows), row),
                of_key.spec(b.rows, of_queries),
                of_key.spec(b.columns, of_keys),
                of_value.spec(b.columns, of_keys),
            ],
            out_specs=[
                of_value.spec(b.rows, of_queries),
                pl.BlockSpec((1, 1, 1, b.rows), head_row),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, b.rows), jnp.float32),
                pltpu.VMEM((1, b.rows), jnp.float32),
                pltpu.VMEM((b.value_width, b.rows), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(of_value.shape(b.batch, b.length, b.heads), values.dtype),
            jax.ShapeDtypeStruct((b.batch, b.heads, 1, b.length), jnp.float32),
        ],
        compiler_params=compiler_params(2),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles * b.rows * b.columns * (b.width + b.value_width),
            transcendentals=tiles * b.rows * b.columns,
            bytes_accessed=moved(b, query) + tiles * b.columns * b.bytes_of_key(keys.dtype),
        ),
        metadata=metadata(b),
        name="flash_attention_forward",
        interpret=interpret,
    )(told.codes, told.reads, query, keys, values)


def moved(blocks: Blocks, query: Float[Array, "..."]) -> int:
    """Bytes of queries and of as many heads of values."""
    return query.nbytes + query.nbytes * blocks.value_width // blocks.width


def metadata(blocks: Blocks) -> dict[str, str]:
    """What a cost model has to know of a kernel besides its FLOPs."""
    return {"masked": f"{blocks.masked:.6f}"}


def roomy(*, interpret: bool) -> bool:
    """Whether the chip that is compiled for has so much memory; a TPU v4 has a quarter of it."""
    return interpret or pltpu.get_tpu_info().vmem_capacity_bytes >= VMEM_BYTES


def compiler_params(parallel: int, arbitrary: int = 1, *, checked: bool = True) -> Any:
    """For a grid whose first axes are independent, and whose last are in order.

    Args:
      parallel, arbitrary: how many axes of either kind.
      checked: whether a TPU stops at a copy from beyond an array, which takes instructions.
    """
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL,) * parallel + (pltpu.ARBITRARY,) * arbitrary,
        vmem_limit_bytes=VMEM_BYTES,
        disable_bounds_checks=not checked,
    )
