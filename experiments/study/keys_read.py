"""How many keys sparse attention reads, counted from its sizes."""

import numpy as np
from jaxtyping import Int

from lineage_jax.kernels import NSAConfig


def selected(block_size: int, num_blocks: int, length: int) -> Int[np.ndarray, "T"]:
    """Of so many blocks, the query's own among them, which it reads up to itself."""
    at = np.arange(length)
    blocks = np.minimum(at // block_size + 1, num_blocks)
    return blocks * block_size - (block_size - 1 - at % block_size)


def three_branches(config: NSAConfig, length: int) -> Int[np.ndarray, "T"]:
    """By native sparse attention, a position that two branches read counted twice.

    Wanted is that a query's own block is always selected: `num_local` of 1 or more.
    """
    assert config.num_local >= 1
    at = np.arange(length)
    compressed = np.maximum(at + 1 - config.compressed_size, -1) // config.stride + 1
    blocks = selected(config.block_size, config.num_blocks, length)
    return np.maximum(compressed, 0) + blocks + np.minimum(at + 1, config.window)


def share(keys: Int[np.ndarray, "T"], queries: slice = slice(None)) -> float:
    """What some queries of a row read, all of them if not said, as a part of all behind them."""
    behind = np.arange(len(keys)) + 1
    return float(keys[queries].sum() / behind[queries].sum())
