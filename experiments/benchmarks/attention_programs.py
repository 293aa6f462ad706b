"""What the static table compiles: branches of attention at some shape, their gradients, a token."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks.attention_counts import Shape
from experiments.benchmarks.splash import splash_attention
from lineage_jax.kernels import (
    PAPER,
    Branches,
    compressed_attention,
    empty_nsa_cache,
    flash_attention,
    nsa_decode,
    selected_attention,
    window_attention,
)

DECODED_ROWS = 16
"""Of the batch that is decoded."""


def attend(branch: str, length: int, *given: Any) -> Any:
    """A branch, of queries, keys and values, and for the selected one of blocks; the compressed
    one chooses them besides."""
    query, keys, values, *blocks = given
    if branch == "full":
        return flash_attention(query, keys, values)
    if branch == "splash":
        return splash_attention(query, keys, values)
    if branch == "compressed":
        return compressed_attention(query, keys, values, length)
    if branch == "selected":
        return selected_attention(query, keys, values, *blocks)
    return window_attention(query, keys, values, PAPER.window)


def gradients(branch: str, length: int, *given: Any) -> tuple[jax.Array, ...]:
    """Those of a branch's queries, keys and values."""
    *heads, grad = given[:3] + given[-1:]

    def attended(*heads):
        return jax.tree.leaves(attend(branch, length, *heads, *given[3:-1]))[0]

    return jax.vjp(attended, *heads)[1](grad)


def decode(length: int, *given: Any) -> Any:
    """A token of each row, read by Native Sparse Attention from a full cache."""
    query, keys, values, gates, cache, positions = given

    def squeeze(pieces):
        return pieces.mean(-2)

    return nsa_decode(query, keys, values, gates, cache, positions, (squeeze, squeeze))


def arguments(branch: str, shape: Shape) -> tuple[Any, ...]:
    """Shapes of what `attend` takes."""
    stored = shape.stored(shape.compressed if branch == "compressed" else None)
    return (shape.query, *stored, *((shape.blocks,) if branch == "selected" else ()))


def of_decode(shape: Shape) -> tuple[Any, ...]:
    """Shapes of what `decode` takes."""
    rows, dtype = DECODED_ROWS, shape.query.dtype
    widths = shape.width, shape.value_width

    def heads(count: int, width: int) -> Any:
        return jax.ShapeDtypeStruct((rows, 1, count, width), dtype)

    cache = jax.eval_shape(
        lambda: empty_nsa_cache(rows, shape.length, shape.groups, *widths, dtype)
    )
    keys, values = (Branches(*[heads(shape.groups, width)] * 3) for width in widths)
    positions = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    return heads(shape.heads, shape.width), keys, values, heads(shape.heads, 3), cache, positions


class Program(NamedTuple):
    """Something to compile.

    Attributes:
      function: of a module, or a partial one.
      arguments: shapes of what it takes.
      donate: which of them may be written over.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...] = ()


def program(what: str, branch: str, shape: Shape) -> Program:
    """What computes a branch "forward", its gradients and itself ("backward"), or "decode"."""
    if what == "decode":
        return Program(functools.partial(decode, shape.length), of_decode(shape), (4,))
    given = arguments(branch, shape)
    if what == "forward":
        return Program(functools.partial(attend, branch, shape.length), given)
    grad = shape.array(shape.heads, shape.value_width)
    return Program(functools.partial(gradients, branch, shape.length), (*given, grad))
