"""Lists of blocks turned round: from what a query selected to the queries that selected a block."""

import jax
import jax.numpy as jnp

from lineage_jax.typing import Array, Int


def selectors(
    blocks: Int[Array, "B T G N"], count: int
) -> tuple[Int[Array, "B G bounds"], Int[Array, "B G pairs"]]:
    """The queries that selected each block.

    Args:
      blocks: that each query selected, -1 for none.
      count: of blocks that there are.

    Returns:
      Where the queries of each block begin, and where those of the last one end.
      Queries sorted by their block; those of no block come last.
    """
    batch, length, groups, _ = blocks.shape
    chosen = jnp.where(blocks < 0, count, blocks).swapaxes(1, 2)  # B G T N
    queries = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[:, None], chosen.shape)
    chosen, queries = (x.reshape(batch, groups, -1) for x in (chosen, queries))
    if (count + 1) * length < 2**31:  # one number is sorted faster than two
        sorted_ = jnp.sort(chosen * length + queries, stable=False)
        found, queries = sorted_ // length, sorted_ % length
    else:
        found, queries = jax.lax.sort((chosen, queries), num_keys=2, is_stable=False)
    bounds = jnp.arange(count + 1, dtype=jnp.int32)
    search = jax.vmap(jax.vmap(lambda x: jnp.searchsorted(x, bounds)))
    return search(found).astype(jnp.int32), queries.astype(jnp.int32)
