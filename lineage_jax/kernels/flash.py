"""Attention that never holds its table of scores: forward and backward.

Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), algorithms 1 and 4, in the order of Dao 2023,
"FlashAttention-2" (arXiv 2307.08691): softmax is accumulated over tiles of keys, and the backward
pass computes the weights again from their logarithmic sums.

Every query reads the keys from a first one to a last one. Causal attention, documents, windows,
chunks of a prompt and keys that stand for several positions differ in these two numbers alone.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lineage_jax.kernels import flash_backward_gpu, flash_gpu, flash_plain
from lineage_jax.kernels import flash_tpu as tpu
from lineage_jax.kernels.blocks import (
    MASKED,
    PAIRS,
    UNKNOWN,
    Expected,
    cut,
    padded_reads,
    pairs_of,
    stored,
    unstored,
)
from lineage_jax.kernels.flash_backward_tpu import backward, inner_products, limits
from lineage_jax.kernels.intervals import Intervals, intervals
from lineage_jax.kernels.platform import platform
from lineage_jax.kernels.window_backward_tpu import window_backward
from lineage_jax.kernels.window_tpu import band_here, window_forward
from lineage_jax.typing import Array, Float, Int

Implementation = Literal[
    "reference",
    "xla",
    "pallas_tpu",
    "pallas_tpu_interpreted",
    "pallas_gpu",
    "pallas_gpu_interpreted",
]
"""A table of scores; tiles of it in plain jnp; kernels; the same on any device, slowly."""

IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


def flash_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    *,
    causal: bool = True,
    window: int | Int[Array, ""] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    offset: int | Int[Array, ""] = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H E"]:
    """softmax(q k / sqrt(K)) v.

    Args:
      query, keys, values: projected heads; query head h reads key-value head h // (H / G).
      causal: whether a query reads only keys that are not after it.
      window: how many keys a query reads at most, itself included; only if `causal`.
      segment_ids: which document each key belongs to, its positions side by side. Documents do not
        meet. One document if not given.
      offset: where the first query stands among the keys: 0 but for a prompt read in chunks.
      implementation: what computes it; if not given, kernels on a TPU or a GPU and tiles elsewhere.

    Raises:
      ValueError: for shapes that do not fit one another, a window without `causal`, or an
        implementation that is not there or cannot run here.
    """
    length, num_keys = query.shape[1], keys.shape[1]
    reads = intervals(
        length, num_keys, causal=causal, window=window, segment_ids=segment_ids, offset=offset
    )
    expected = expectation(causal, window)
    return interval_attention(
        query, keys, values, *reads, expected=expected, implementation=implementation
    )


def expectation(causal: bool, window: int | Int[Array, ""] | None) -> Expected:
    """What is known of the intervals of causal attention and windows before they are computed."""
    known = int(window) if isinstance(window, int | np.integer) else None
    return Expected(diagonal=causal, window=known)


def interval_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    first: Int[Array, "#B T"],
    last: Int[Array, "#B T"],
    *,
    expected: Expected = UNKNOWN,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H E"]:
    """softmax(q k / sqrt(K)) v over keys first ... last of each query; 0 where there are none.

    Args:
      query, keys, values: projected heads; query head h reads key-value head h // (H / G).
      first, last: of each query, both inclusive; neither goes back from one query to the next.
      expected: what is known of them already, for the choice of tiles.
      implementation: what computes it; if not given, kernels on a TPU or a GPU and tiles elsewhere.

    Raises:
      ValueError: for shapes that do not fit one another, or an implementation that is not there
        or cannot run here.
    """
    return interval_attention_with_sums(
        query, keys, values, first, last, expected=expected, implementation=implementation
    )[0]


def interval_attention_with_sums(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    first: Int[Array, "#B T"],
    last: Int[Array, "#B T"],
    *,
    expected: Expected = UNKNOWN,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """`interval_attention`, and the logarithm of the sum under each softmax, float32.

    Both have gradients. Where nothing is read the logarithm is MASKED, a large negative number.
    """
    check(query, keys, values, first, last)
    name = chosen(implementation)
    reads = clipped(Intervals(first, last), keys.shape[1])
    if name == "reference":
        return flash_plain.reference(query, keys, values, reads)
    if name == "xla":
        return flash_plain.in_tiles(query, keys, values, reads, expected.window)
    with jax.named_scope("interval_attention"):  # or "jvp" would be in the names of kernels
        return by_kernels(query, keys, values, reads, expected, name)


def chosen(implementation: str | None) -> str:
    """The implementation, by name.

    Raises:
      ValueError: naming those there are, or those that run here, if it is not one of them.
    """
    here = platform()
    if implementation is None:
        return f"pallas_{here}" if here in ("tpu", "gpu") else "xla"
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"wanted an implementation of {names}, got {implementation!r}")
    wanted = implementation.removeprefix("pallas_")
    if wanted in ("tpu", "gpu") and wanted != here:
        raise ValueError(
            f"{implementation!r} is compiled for a {wanted.upper()}, and this is a {here}: ask for "
            f"'xla', or for '{implementation}_interpreted', which is slow"
        )
    return implementation


def kernels(name: str, expected: Expected) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward pass of an implementation."""
    options: dict[str, Any] = dict(interpret=name.endswith("_interpreted"))
    forward: Callable[..., Any] = flash_gpu.flash_forward
    backward: Callable[..., Any] = flash_backward_gpu.flash_backward
    if name.startswith("pallas_tpu"):
        forward, backward, options["expected"] = flash_forward, flash_backward, expected
    return functools.partial(forward, **options), functools.partial(backward, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def by_kernels(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    reads: Intervals,
    expected: Expected,
    name: str,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """Attended values and sums, by the kernels of an implementation."""
    return kernels(name, expected)[0](query, keys, values, reads)


def _by_kernels_forward(query, keys, values, reads, expected, name):
    out, log_sum = kernels(name, expected)[0](query, keys, values, reads)
    return (out, log_sum), (query, keys, values, reads, out, log_sum)


def _by_kernels_backward(expected, name, saved, grads):
    out_grad, sum_grad = grads
    found = kernels(name, expected)[1](*saved, out_grad, sum_grad=sum_grad)
    return *found, None


by_kernels.defvjp(_by_kernels_forward, _by_kernels_backward)


def flash_forward(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    reads: Intervals,
    *,
    expected: Expected = UNKNOWN,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """`interval_attention_with_sums` by the kernel for TPU, without a gradient of its own.

    Args:
      query, keys, values: projected heads.
      reads: the keys that each query reads; none that is not there.
      expected: of `interval_attention`.
      interpret: computes on any device, slowly, as a TPU would.
    """
    heads = query, keys, values
    if band := band_here(*heads, reads, expected, interpret=interpret):
        return window_forward(band, *heads, reads, interpret=interpret)
    blocks = cut(query.shape, keys.shape, values.shape[-1], expected)
    listed = reads.first.shape[0] * blocks.num_columns  # pairs for each tile of queries, at most
    if (most := max(1, PAIRS // listed)) < blocks.num_rows:
        size = most * blocks.rows
        parts = [
            flash_forward(
                query[:, start : start + size],
                *(keys, values),
                Intervals(*(x[:, start : start + size] for x in reads)),
                expected=expected,
                interpret=interpret,
            )
            for start in range(0, query.shape[1], size)
        ]
        outs, sums = zip(*parts, strict=True)
        return jnp.concatenate(outs, axis=1), jnp.concatenate(sums, axis=2)
    length, whole = query.shape[1], padded_reads(blocks, reads)
    given = tpu.told(pairs_of(blocks, whole), whole)
    arrays = padded(blocks.length, query), *(padded(blocks.num_keys, x) for x in (keys, values))
    out, log_sum = tpu.forward(blocks, given, *arrays, interpret=interpret)
    return unstored(out, values.shape[-1])[:, :length], log_sum[:, :, 0, :length]


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
    expected: Expected = UNKNOWN,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S G K"], Float[Array, "B S G E"]]:
    """The gradients of queries, keys and values, from what `flash_forward` took and returned.

    Args:
      query, keys, values, reads, expected, interpret: of `flash_forward`.
      out, log_sum: its results.
      out_grad, sum_grad: their gradients; the sums have none if not given.
    """
    heads = query, keys, values
    if band := band_here(*heads, reads, expected, backward=True, interpret=interpret):
        options: dict[str, Any] = dict(sum_grad=sum_grad, interpret=interpret)
        return window_backward(band, *heads, reads, out, log_sum, out_grad, **options)
    most = limits(interpret=interpret)
    blocks = cut(query.shape, keys.shape, values.shape[-1], expected, **most)
    length, num_keys = query.shape[1], keys.shape[1]
    of_queries = [padded(blocks.length, x) for x in (query, out, out_grad)]
    of_keys = [padded(blocks.num_keys, x) for x in (keys, values)]
    inner = inner_products(blocks, *of_queries[1:], interpret=interpret)
    ends = ((0, 0), (0, 0), (0, blocks.length - length))
    if sum_grad is not None:
        inner -= jnp.pad(sum_grad, ends)[:, :, None]
    # Where nothing is read, and in padding, there are no weights.
    log_sum = jnp.where(log_sum > MASKED / 2, log_sum, -MASKED)
    log_sum = jnp.pad(log_sum, ends, constant_values=-MASKED)[:, :, None]
    given = (of_queries[0], *of_keys, of_queries[2], log_sum, inner)
    grads = backward(blocks, padded_reads(blocks, reads), *given, interpret=interpret)
    found_query, found_keys, found_values = (
        unstored(x, like.shape[-1]) for x, like in zip(grads, (query, keys, values), strict=True)
    )
    return found_query[:, :length], found_keys[:, :num_keys], found_values[:, :num_keys]


def clipped(reads: Intervals, num_keys: int) -> Intervals:
    """Without keys that are not there."""
    first, last = (x.astype(jnp.int32) for x in reads)
    return Intervals(jnp.clip(first, 0, num_keys), jnp.clip(last, -1, num_keys - 1))


def padded(length: int, heads: Float[Array, "B T H K"]) -> Float[Array, "..."]:
    """As many positions more at the end as there are too few, as kernels read them."""
    ends = ((0, 0), (0, length - heads.shape[1]), (0, 0), (0, 0))
    return stored(jnp.pad(heads, ends))


def check(query: Any, keys: Any, values: Any, first: Any, last: Any) -> None:
    """Holds the shapes of one call to one another.

    Raises:
      ValueError: naming the first that does not fit.
    """
    batch, length, num_heads, width = query.shape
    _, num_keys, num_groups, _ = keys.shape
    if num_heads % num_groups:
        raise ValueError(
            f"{num_groups} heads of keys and values must divide {num_heads} heads of queries"
        )
    wanted = {
        "keys": ((batch, num_keys, num_groups, width), keys),
        "values": ((batch, num_keys, num_groups, values.shape[-1]), values),
    }
    for name, (shape, array) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"wanted {name} of shape {shape}, got {array.shape}")
    for name, array in {"first": first, "last": last}.items():
        if array.shape not in ((batch, length), (1, length)):
            raise ValueError(f"wanted {name} of shape {(batch, length)}, got {array.shape}")
