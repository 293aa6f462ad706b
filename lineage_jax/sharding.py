"""The mesh, and which of its axes each logical axis of a parameter or a batch is split over.

Models name the axes of their parameters ("embed", "heads", ...) and know no mesh; the rules here
send those names to mesh axes. One device is a mesh of one, so there is no other path. Three axes
ask for more than a split, and `lineage_jax.nn` looks whether its mesh has them: over `context`
attention goes round in a ring, over `stage` the blocks become a pipeline, over `expert` tokens
travel to their experts and back.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")
"""Outermost first: neighbours along the last are the closest chips, and talk the most."""

RULES: Mapping[str, tuple[str, ...]] = {
    # Batches: split over all that hold a replica of the computation, whatever they hold of the
    # parameters. Outside the blocks the stages of a pipeline are such replicas too.
    "batch": ("data", "stage", "fsdp", "expert"),
    "length": ("context",),
    "embed_activation": (),
    # Parameters: one axis over fsdp (Rajbhandari et al. 2020, ZeRO stage 3), and over what else
    # would only repeat them; one over tensor (Shoeybi et al. 2019, Megatron-LM, section 3).
    "embed": ("fsdp", "expert", "context"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "head": (),
    "gates": (),
    "position": (),
    "embed_vector": (),
    "layers": ("stage",),
    "experts": ("expert",),
}
"""Logical axis name -> mesh axes. A mesh axis splits one axis of an array, the first to claim it:
of a kernel (experts, embed, mlp) `expert` splits the experts, and `embed` has the rest of its own.
"""

WHOLE_IF_UNEVEN = frozenset({"vocab"})
"""Axes that stay whole where the mesh does not divide them: a vocabulary is what it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many ways each mesh axis splits; at most one may be -1, which takes what is left."""

    data: int = -1
    """Replicas of the whole model, each with its share of the batch."""
    stage: int = 1
    """Stages of the pipeline, each with its share of the layers."""
    fsdp: int = 1
    """Shares of the parameters and of the batch (fully sharded data parallel)."""
    expert: int = 1
    """Shares of the experts of a mixture; of the batch and the parameters elsewhere."""
    context: int = 1
    """Shares of each sequence, whose attention goes round in a ring."""
    tensor: int = 1
    """Shares of the heads, the feed-forward width and the vocabulary."""

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """The extent of each axis on `num_devices` devices.

        Raises:
          ValueError: if the axes do not multiply to the number of devices.
        """
        asked = {axis: getattr(self, axis) for axis in AXES}
        shown = {a: n for a, n in asked.items() if n != 1} or {"data": 1}
        wanted = " x ".join(f"{axis}={size}" for axis, size in shown.items())
        free = [axis for axis, size in asked.items() if size == -1]
        if len(free) > 1 or any(size < 1 and size != -1 for size in asked.values()):
            raise ValueError(f"mesh axes must be 1 or more, at most one of them -1; got {wanted}")
        fixed = math.prod(size for size in asked.values() if size != -1)
        if num_devices % fixed or (not free and fixed != num_devices):
            raise ValueError(
                f"mesh {wanted} needs {'a multiple of ' if free else ''}{fixed} devices, got "
                f"{num_devices}; choose axes whose product is {num_devices}"
            )
        return tuple(num_devices // fixed if axis in free else asked[axis] for axis in AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of `AXES` over all (or the given) devices."""
    devices = jax.devices() if devices is None else list(devices)
    sizes, types = config.sizes(len(devices)), (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, types, devices=devices)
    except NotImplementedError:  # on no whole dimensions of a torus: 128 x 4 on one of 8 x 8 x 8
        split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Where `nn.with_logical_constraint` inside a model means this mesh and these rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(RULES.items())):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def named(
    arrays: Mapping[str, tuple[tuple[int, ...], Any]], axes: Sequence[str]
) -> dict[str, nn.LogicallyPartitioned]:
    """Shapes and types of a batch's arrays, in boxes that name their axes, all alike."""
    return {
        name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(*array), tuple(axes))
        for name, array in arrays.items()
    }


class Feed:
    """Brings the rows that each process reads of a global batch to where they are computed with.

    Attributes:
      rows: the indices of the rows of a global batch that this process's devices hold, rising.
      shardings: of each array of one batch; `stacked` of batches of several steps on end.
    """

    def __init__(self, batch: Mapping[str, nn.LogicallyPartitioned], mesh: Mesh):
        """Plans for batches of the given (boxed) shapes.

        Raises:
          ValueError: if the mesh does not divide a batch, naming the sizes that would.
        """
        self.shardings = shardings(batch, mesh, "batch")
        self.stacked = {
            name: NamedSharding(mesh, PartitionSpec(None, *one.spec))
            for name, one in self.shardings.items()
        }
        self._num_rows = next(iter(batch.values())).value.shape[0]
        over_rows = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
        here = over_rows.addressable_devices_indices_map((self._num_rows,)).values()
        self.rows = np.unique([np.arange(self._num_rows)[index] for index in here])

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's `rows` of a batch, [R, ...] each, as global arrays [B, ...]."""
        return self._place(rows, self.shardings, 0)

    def stack(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The same for batches of several steps on end: [S, R, ...] become [S, B, ...]."""
        return self._place(rows, self.stacked, 1)

    def _place(self, rows, shardings, axis):
        def array(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                wanted = range(*index[axis].indices(self._num_rows))
                first = int(np.searchsorted(self.rows, wanted.start))
                here = slice(first, first + len(wanted))
                return local[(*index[:axis], here, *index[axis + 1 :])]

            shape = (*local.shape[:axis], self._num_rows, *local.shape[axis + 1 :])
            return jax.make_array_from_callback(shape, sharding, shard)

        return {name: array(local, shardings[name]) for name, local in rows.items()}


def shardings(boxed: Any, mesh: Mesh, kind: str = "parameter") -> Any:
    """The sharding of each array, from the names of its axes.

    Args:
      boxed: a pytree whose leaves are `nn.LogicallyPartitioned` arrays or shapes, as
        `jax.eval_shape(module.init, ...)` returns them; leaves without names are replicated.
      mesh: the mesh.
      kind: what an error calls one of them.

    Returns:
      The same tree, unboxed, of `NamedSharding`.

    Raises:
      ValueError: if a mesh axis does not divide an array, naming both and the sizes that would.
    """

    def sharding(path, leaf):
        if not isinstance(leaf, nn.meta.AxisMetadata):
            return replicated(mesh)
        entries: list[tuple[str, ...] | None] = []
        for name, extent in zip(leaf.names, leaf.value.shape, strict=True):
            taken = {axis for entry in entries for axis in entry or ()}
            axes = tuple(a for a in RULES[name] if a not in taken and mesh.shape[a] > 1)
            where = f"{kind} {jax.tree_util.keystr(path, simple=True, separator='/')}"
            entries.append(_fitting(axes, name, extent, mesh, where))
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree_util.tree_map_with_path(
        sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )


def _fitting(
    axes: tuple[str, ...], name: str, extent: int, mesh: Mesh, where: str
) -> tuple[str, ...] | None:
    """The mesh axes, if together they divide the extent."""
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if extent % ways == 0:
        return axes or None
    if name in WHOLE_IF_UNEVEN:
        return None
    over = " x ".join(axes)
    fitting = [n for n in range(1, extent + 1) if extent % n == 0 and n <= mesh.size]
    raise ValueError(
        f"{where}: axis {name!r} of {extent} does not divide over mesh axis {over}={ways}; "
        f"sizes that would: {', '.join(map(str, fitting))}"
        + (f"; or a multiple of {ways} rows a batch" if name == "batch" else "")
    )


def sharded(init: Callable[[], Any], mesh: Mesh) -> Callable[[], Any]:
    """A compiled `init` that makes each array where it will live, never whole on one device.

    Returns:
      A function of nothing, for what `init` returns, unboxed, sharded by the names of its boxes.
    """
    where = shardings(jax.eval_shape(init), mesh)
    compiled = jax.jit(lambda: nn.meta.unbox(init()), out_shardings=where)

    def run() -> Any:
        with use(mesh):
            return compiled()

    return run


def init_sharded(init: Callable[[], Any], mesh: Mesh) -> Any:
    """What `init` returns, unboxed and made where it will live (`sharded`)."""
    return sharded(init, mesh)()
