"""Who may attend to whom, as what decides it, and as a table: True where a query reads a key."""

from typing import Any

import jax.numpy as jnp
from flax import struct

from lineage_jax.typing import Array, Bool, Int


def causal_mask(
    queries: Int[Array, "#B T"],
    keys: Int[Array, "#B S"],
    window: int | Int[Array, ""] | None = None,
) -> Bool[Array, "#B 1 T S"]:
    """A query reads keys that are not after it, and within the last `window` if there is one.

    Args:
      queries: index of each query in its sequence.
      keys: index of each key in the same sequence.
      window: how many keys a query reads at most, itself included; None reads all.
    """
    distance = queries[:, None, :, None] - keys[:, None, None, :]  # B 1 T S
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def segment_mask(queries: Int[Array, "#B T"], keys: Int[Array, "#B S"]) -> Bool[Array, "#B 1 T S"]:
    """A query reads keys of its own document: documents packed in one row do not meet."""
    return queries[:, None, :, None] == keys[:, None, None, :]


@struct.dataclass
class Mask:
    """Which keys each query reads, without the table of T S answers until it is asked for.

    Attributes:
      queries, keys: index of each query and key in its sequence, [#B, T] and [#B, S].
      query_segments, key_segments: which document each belongs to, its positions side by side; None
        where there is one.
      window: how many keys a query reads at most, itself included; None reads all.
      readable: whether a key may be read at all, [#B, S]: padding may not. None where all may.
      causal: whether a query reads only keys that are not after it.
    """

    # Any: a pytree also holds shardings or shapes in the places of its arrays.
    queries: Any
    keys: Any
    query_segments: Any = None
    key_segments: Any = None
    window: Any = None
    readable: Any = None
    causal: bool = struct.field(pytree_node=False, default=True)

    def dense(self) -> Bool[Array, "#B 1 T S"]:
        """The table."""
        if self.causal:
            table = causal_mask(self.queries, self.keys, self.window)
        else:
            distance = jnp.abs(self.queries[:, None, :, None] - self.keys[:, None, None, :])
            table = distance < (jnp.iinfo(jnp.int32).max if self.window is None else self.window)
        if self.query_segments is not None:
            table &= segment_mask(self.query_segments, self.key_segments)
        if self.readable is not None:
            table &= self.readable[:, None, None, :]
        return table


def documents(mask: Mask, batch: int) -> Int[Array, "B T"] | None:
    """Which document each position is of; padding is of none, so that no document reads it."""
    ids = mask.key_segments
    if mask.readable is not None:
        readable = mask.readable.astype(jnp.int32)
        ids = readable if ids is None else 2 * ids + readable
    return None if ids is None else jnp.broadcast_to(ids, (batch, ids.shape[1]))
