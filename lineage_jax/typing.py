"""The one alphabet of axis letters, and the array types that signatures use.

    B  batch                    T  length (of queries)      S  length (of keys)
    D  width of the residual    V  vocabulary               L  layers
    H  query heads              G  key-value heads          K  width of one head
    F  width of the MLP         M  input width of a projection, N  its output width, or the units
                                                               of a recurrence
    E  width of a value's head, where it is not K
    C  compressed keys          J  blocks of positions      N  of them those that a query selects
    P  positions in a block     R  query heads in a group, H / G

A lower-case letter in an einsum is the same axis. `#B` may be 1. Shapes are checked in the tests
(jaxtyping and beartype) and cost nothing in production.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

Precision = Literal["float32", "bfloat16", "float16"]
"""The name of a floating-point type, as a config file or a command line spells it."""

Params = Mapping[str, Any]
"""A nested dict of parameter arrays, as `module.init(...)["params"]` returns it."""

Batch = Mapping[str, jax.Array]
"""Named arrays of one step, each with the batch axis first."""

__all__ = [
    "Array",
    "Batch",
    "Bool",
    "DTypeLike",
    "Float",
    "Int",
    "PRNGKeyArray",
    "Params",
    "Precision",
    "Shaped",
]
