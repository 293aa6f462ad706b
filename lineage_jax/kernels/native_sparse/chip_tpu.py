"""What the kernels for TPU have in common: memory on the chip, and tiles of queries."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from lineage_jax.kernels.blocks import LANES, MASKED
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.typing import Array, Float, Int

LEAST = MASKED / 2
"""Where the largest score of a query starts: masked scores have a weight of 0 beside it."""
NOWHERE = 2**30
"""A position after all others."""
SUBLANES = 8
"""Rows of one of a TPU's vector registers."""
TILE = 128
"""Queries of a step of the grid: one to a lane."""


def on_chip() -> int:
    """Bytes of vector memory of one core; those of the smallest of recent ones if not on a TPU."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return 64 * 2**20


def matrix_width() -> int:
    """Columns of a matrix unit; of those of a TPU v5e if not on a TPU."""
    try:
        return pltpu.get_tpu_info().mxu_column_size
    except ValueError:
        return LANES


def padded_bytes(rows: int, width: int, dtype: Any) -> int:
    """Of a matrix in vector memory, where rows are whole rows of lanes."""
    return rows * -(-width // LANES) * LANES * jnp.dtype(dtype).itemsize


def compiler_params(parallel: int, arbitrary: int) -> Any:
    """For a grid whose first axes are independent, and whose last are in order."""
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL,) * parallel + (pltpu.ARBITRARY,) * arbitrary,
        vmem_limit_bytes=on_chip(),
        disable_bounds_checks=True,  # of copies: instructions for each
    )


def whole_tiles(x: Array, fill: int = 0) -> Array:
    """An array [B, T, ...] with as many queries more as fill the last tile."""
    padding = ((0, 0), (0, -x.shape[1] % TILE)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, padding, constant_values=fill)


def by_group(heads: Float[Array, "B T H K"], num_groups: int) -> Float[Array, "B S G R K"]:
    """Query heads by the key-value head they read, in whole tiles of queries."""
    heads = whole_tiles(heads)
    return heads.reshape(*heads.shape[:2], num_groups, -1, heads.shape[-1])


def ungrouped(heads: Float[Array, "B S G R K"], length: int) -> Float[Array, "B T H K"]:
    """Query heads of the first positions, side by side."""
    return heads.reshape(*heads.shape[:2], -1, heads.shape[-1])[:, :length]


def spans(reach: Intervals, length: int) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """The first key of each query, and how far the last one is from it, in whole tiles.

    So one subtraction and one unsigned comparison decide. A query that reads nothing has one key,
    which is nowhere.

    Args:
      reach: of queries.
      length: of keys.
    """
    first, last = jnp.maximum(reach.first, 0), jnp.minimum(reach.last, length - 1)
    empty = last < first
    first, span = jnp.where(empty, NOWHERE, first), jnp.where(empty, 0, last - first)
    return whole_tiles(first.astype(jnp.int32), NOWHERE), whole_tiles(span.astype(jnp.int32))
