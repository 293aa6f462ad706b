"""What a module may ask of the mesh it runs on: over what, and how many ways, an axis is split.

Models say nothing of this; the layers that do their work differently when it is split look here.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from lineage_jax.kernels import aligned


def mesh_axes(name: str) -> dict[str, int]:
    """The mesh axes over which a logical axis is split here, and their extents.

    An axis that is split by hand already, inside a `shard_map` over it, does not count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = dict(nn.get_logical_axis_rules()).get(name) or ()
    return {
        axis: mesh.shape[axis]
        for axis in ((axes,) if isinstance(axes, str) else axes)
        if mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes
    }


def split(name: str) -> tuple[str, int] | None:
    """The one mesh axis over which a logical axis is split here, and its extent; None if whole.

    Raises:
      ValueError: if it is split over several mesh axes, which no algorithm here goes along.
    """
    found = mesh_axes(name)
    if len(found) > 1:
        raise ValueError(f"axis {name!r} must be split over one mesh axis, got {found}")
    return next(iter(found.items()), None)


def ways(name: str, *, but: str) -> int:
    """How many ways a logical axis is split here by all mesh axes but one."""
    return math.prod(extent for axis, extent in mesh_axes(name).items() if axis != but)


@contextlib.contextmanager
def without(axis: str) -> Iterator[None]:
    """Where the rules of logical axes leave out a mesh axis, because it is split by hand."""
    rules = []
    for name, axes in nn.get_logical_axis_rules():
        names = (axes,) if isinstance(axes, str) else axes or ()
        rules.append((name, tuple(a for a in names if a != axis)))
    with nn.logical_axis_rules(rules):
        yield


def undivided(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which differentiation takes as it is or leaves, and never in part.

    Where a `lax.scan` is differentiated, jax takes what does not change from turn to turn out of
    the loop, out of a `shard_map` in it too; if that is inside another `shard_map`, the pieces
    come out split over the axes of both, which the partitioner refuses (jax 0.10 and 0.12).
    """
    opaque = jax.custom_batching.custom_vmap(function)

    @opaque.def_vmap
    def rule(axis_size, in_batched, *arguments):
        axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
        out = jax.vmap(function, axes, axis_size=axis_size)(*arguments)
        return out, jax.tree.map(lambda _: True, out)

    return opaque


def on_each_device(
    function: Callable[..., tuple[Any, ...]],
    arguments: Sequence[Any],
    takes: Sequence[Sequence[str | None]],
    gives: Sequence[Sequence[str | None]],
) -> tuple[Any, ...]:
    """`function(*arguments)` on every device, for its part of them: no compiler splits a kernel.

    Args:
      function: to several arrays, of which no part needs another.
      arguments: whose axes the mesh divides.
      takes, gives: logical names of the axes of each argument and result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    if not axes:
        return function(*arguments)

    def spec(names: Sequence[str | None]) -> P:
        return P(*(tuple(mesh_axes(name)) if name else None for name in names))

    mapped = jax.shard_map(
        function,
        in_specs=tuple(map(spec, takes)),
        out_specs=tuple(map(spec, gives)),
        axis_names=axes,
        check_vma=False,
    )
    out = undivided(mapped)(*arguments)
    # Unchecked, results pass for the same along an axis that is split by hand around this.
    differs = varying(*arguments)
    return tuple(jax.lax.pcast(x, tuple(differs - varying(x)), to="varying") for x in out)


def varying(*arrays: Any) -> frozenset[str]:
    """Mesh axes along which any of the arrays differs, of those that are split by hand here."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays))
    )


def stored_axes(width: int) -> tuple[str | None, ...]:
    """Logical names of the axes of heads of that width as `lineage_jax.kernels.stored` has them."""
    if aligned(width):
        return ("batch", "length", "heads")
    return ("batch", "heads", "length", None)
