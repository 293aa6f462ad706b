"""Attention on each device of a mesh for its own rows and heads, which no compiler splits."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from lineage_jax.nn.split import mesh_axes, on_each_device
from lineage_jax.typing import Array, Float

# Logical names of the axes of what has heads [B, T, heads, K], and of ids of positions [B, T].
# Heads of keys and values are split as those of queries are.
HEADS, IDS = ("batch", None, "heads", None), ("batch", None)

Attend = Callable[[Any, Any], Float[Array, "B T H E"]]


def by_rows_and_heads(function: Attend, heads: Any, ids: Any) -> Float[Array, "B T H E"]:
    """`function(heads, ids)`, of which no row or group of heads needs another.

    Args:
      function: to be differentiated with respect to `heads`.
      heads: a pytree of arrays [B, T, heads, K], of any T, heads and K.
      ids: a pytree of arrays [B, T] of integers.
    """
    rows, groups = (math.prod(mesh_axes(name).values()) for name in ("batch", "kv_heads"))
    leaves = jax.tree.leaves(heads)
    divides = all(x.shape[0] % rows == 0 and x.shape[2] % groups == 0 for x in leaves)
    if divides and jax.sharding.get_abstract_mesh().size > 1:
        return divided(function, heads, ids)
    return function(heads, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def divided(function: Attend, heads: Any, ids: Any) -> Float[Array, "B T H E"]:
    """The same on a mesh that divides them."""

    def local(heads, ids):
        return (function(heads, ids),)

    return on_each_device(local, (heads, ids), (HEADS, IDS), (HEADS,))[0]


def divided_forward(function, heads, ids):
    return divided(function, heads, ids), (heads, ids)


def divided_backward(function, saved, grad):
    """Each device computes its part again, to differentiate it."""
    heads, ids = saved

    def local(heads, ids, grad):
        # In a pipeline what is given is marked as varying along its axis. Not all that is computed
        # of it here, unchecked, is marked too, and differentiation wants both alike: a sum is not.
        heads, ids, grad = jax.tree.map(lambda x: x + 0, (heads, ids, grad))
        _, pull_back = jax.vjp(lambda heads: function(heads, ids), heads)
        return tuple(jax.tree.leaves(pull_back(grad)))

    leaves, form = jax.tree.flatten(heads)
    grads = on_each_device(local, (heads, ids, grad), (HEADS, IDS, HEADS), (HEADS,) * len(leaves))
    return jax.tree.unflatten(form, grads), None


divided.defvjp(divided_forward, divided_backward)


def refuse_split_sequences(what: str) -> None:
    """For what needs the whole sequence on each device.

    Raises:
      ValueError: on a mesh that splits it.
    """
    if axes := mesh_axes("length"):
        told = ", ".join(f"{axis}={extent}" for axis, extent in axes.items())
        raise ValueError(
            f"{what} takes whole sequences: wanted context=1, got {told}; "
            "split the batch (data, fsdp) or the heads (tensor)"
        )
