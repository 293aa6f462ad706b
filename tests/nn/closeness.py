"""When two ways to compute the same are the same."""

from typing import Any

import jax
import numpy as np

from tests.parity_table import record

ANOTHER_ORDER = 5e-6
"""Of the largest entry: what sums of some hundred float32 products differ by in another order."""


def assert_same(actual: Any, expected: Any) -> None:
    """Leaf by leaf, every entry is within `ANOTHER_ORDER` of the largest."""
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(one) - other).max() / np.abs(other).max()
        record("outputs", error)
        assert error < ANOTHER_ORDER, error
