"""Who may attend to whom: boolean masks, True where a query may read a key."""

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


def segment_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """A query reads keys of its own document: documents packed in one row do not meet."""
    return queries[:, None, :, None] == keys[:, None, None, :]
