"""Which keys each query reads, where these lie side by side: from a first one to a last one."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lineage_jax.typing import Array, Int


class Intervals(NamedTuple):
    """The keys that each query reads. Neither end ever goes back from one query to the next.

    Attributes:
      first: the first key that a query reads.
      last: the last one; less than `first` where it reads none.
    """

    first: Int[Array, "#B T"]
    last: Int[Array, "#B T"]


def documents(segment_ids: Int[Array, "#B S"]) -> Intervals:
    """Where the document of each key begins and ends, its positions side by side."""
    at = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    differs = jnp.diff(segment_ids, axis=1) != 0
    begins = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    first = jnp.maximum.accumulate(jnp.where(begins, at, 0), axis=1)
    last = jnp.minimum.accumulate(jnp.where(ends, at, at[-1])[:, ::-1], axis=1)[:, ::-1]
    return Intervals(first, last)


def intervals(
    length: int,
    num_keys: int,
    *,
    causal: bool = True,
    window: int | Int[Array, ""] | None = None,
    segment_ids: Int[Array, "#B S"] | None = None,
    offset: int | Int[Array, ""] = 0,
) -> Intervals:
    """What queries at positions offset ... offset + length - 1 read of `num_keys` keys.

    Args:
      length, num_keys: how many there are of both.
      causal: whether a query reads only keys that are not after it.
      window: how many keys a query reads at most, itself included; only if `causal`.
      segment_ids: which document each key belongs to, its positions side by side; one document if
        not given. A query belongs to that of the key at its own position.
      offset: where the first query stands among the keys.

    Raises:
      ValueError: for a window that is not causal, or below 1; for queries whose document is not
        told, as there are more of them than keys.
    """
    if window is not None and not causal:
        raise ValueError("a window needs causal attention")
    if isinstance(window, int | np.integer) and window < 1:
        raise ValueError(f"wanted a window of at least 1 key, got {window}")
    at = (offset + jnp.arange(length, dtype=jnp.int32))[None].astype(jnp.int32)  # 1 T
    first, last = jnp.zeros_like(at), jnp.full_like(at, num_keys - 1)
    if segment_ids is not None:
        past = offset + length if isinstance(offset, int) else length
        if past > num_keys or segment_ids.shape[1] != num_keys:
            raise ValueError(
                f"wanted the documents of {num_keys} keys and at most as many queries, got "
                f"{segment_ids.shape[1]} and queries up to position {past - 1}"
            )
        here = jnp.broadcast_to(at, (segment_ids.shape[0], length))
        ends = documents(segment_ids)
        first, last = (jnp.take_along_axis(x, here, axis=1) for x in ends)
    if causal:
        last = jnp.minimum(last, at)
    if window is not None:
        first = jnp.maximum(first, at - jnp.asarray(window, jnp.int32) + 1)
    return Intervals(first, last)
