"""The choice of blocks on a TPU: of what each is worth to a query, the best ones, one by one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lineage_jax.kernels.native_sparse.chip_tpu import NOWHERE, SUBLANES, TILE


def choose(worth_ref: Any, low: Any, high: Any, taken: Any) -> Any:
    """The block worth most to each query, [1, queries], the lowest of several; NOWHERE if none.

    Args:
      worth_ref: what blocks are worth, [chunks, blocks, queries], -inf for none; it forgets
        `taken`.
      low, high: the first chunk to look at, and the one after the last.
      taken: the block that was chosen before.
    """
    blocks = worth_ref.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, TILE), 0)

    def look(i, best):
        found = []
        for n in range(0, blocks, SUBLANES):
            here, begin = pl.ds(n, SUBLANES), i * blocks + n
            worth = jnp.where(row == taken - begin, -jnp.inf, worth_ref[i, here])
            worth_ref[i, here] = worth
            found.append((worth, begin))
        while len(found) > 1:  # neighbours, so that the lower one comes first
            ends = found[len(found) // 2 * 2 :]
            found = [better(*pair) for pair in zip(found[::2], found[1::2], strict=False)] + ends
        return better(best, found[0])

    start = jnp.full((SUBLANES, TILE), -jnp.inf), jnp.full((SUBLANES, TILE), NOWHERE)
    most, where = jax.lax.fori_loop(low, high, look, start)
    ties = most == most.max(0, keepdims=True)
    return jnp.where(ties, where + row, 2 * NOWHERE - 1).min(0, keepdims=True)


def better(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    """Of two worths, each with where it is, the larger; the first one if they are equal."""
    more = other[0] > one[0]
    return jnp.where(more, other[0], one[0]), jnp.where(more, other[1], one[1])


def in_order(chosen_ref: Any, each: int) -> Any:
    """Blocks [N, queries] from the lowest to the highest, and -1 for those that are none."""
    blocks = chosen_ref[...]
    row = jax.lax.broadcasted_iota(jnp.int32, blocks.shape, 0)
    rank = jnp.zeros_like(blocks)
    for n in range(each):
        other = chosen_ref[n : n + 1]
        rank += ((other < blocks) | ((other == blocks) & (n < row))).astype(jnp.int32)
    chosen_ref[...] = rank
    sorted_ = jnp.zeros_like(blocks)
    for n in range(each):
        sorted_ += jnp.where(chosen_ref[n : n + 1] == row, blocks[n : n + 1], 0)
    return jnp.where(sorted_ < NOWHERE, sorted_, -1)
