"""What a module may ask of the mesh it runs on: over what, and how many ways, an axis is split.

Models say nothing of this; the layers that do their work differently when it is split look here.
"""

import contextlib
import math
from collections.abc import Iterator

import jax
from flax import linen as nn


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
