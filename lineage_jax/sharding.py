"""The mesh, and which of its axes each logical axis of a parameter or a batch is split over.

Models name the axes of their parameters ("embed", "heads", ...) and know no mesh; the rules here
send those names to mesh axes. One device is a mesh of one, so there is no other path.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

RULES: Mapping[str, tuple[str, ...]] = {
    # Batches: split over the replicas, whether or not these split the parameters too.
    "batch": ("data", "fsdp"),
    "length": (),
    "embed_activation": (),
    # Parameters: one axis over fsdp (Rajbhandari et al. 2020, ZeRO stage 3), one over tensor
    # (Shoeybi et al. 2019, Megatron-LM, section 3).
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "head": (),
    "position": (),
    "embed_vector": (),
    "layers": (),
}
"""Logical axis name -> mesh axes."""

WHOLE_IF_UNEVEN = frozenset({"vocab"})
"""Axes that stay whole where the mesh does not divide them: a vocabulary is what it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many ways each mesh axis splits; at most one may be -1, which takes what is left."""

    data: int = -1
    """Replicas of the whole model, each with its share of the batch."""
    fsdp: int = 1
    """Shares of the parameters and of the batch (fully sharded data parallel)."""
    tensor: int = 1
    """Shares of the heads, the feed-forward width and the vocabulary."""

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """The extent of each axis on `num_devices` devices.

        Raises:
          ValueError: if the axes do not multiply to the number of devices.
        """
        asked = {axis: getattr(self, axis) for axis in AXES}
        wanted = " x ".join(f"{axis}={size}" for axis, size in asked.items())
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
    """A mesh with the axes data, fsdp and tensor over all (or the given) devices."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh(
        config.sizes(len(devices)), AXES, (AxisType.Auto,) * len(AXES), devices=devices
    )


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Where `nn.with_logical_constraint` inside a model means this mesh and these rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(RULES.items())):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the replicas."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def stack_sharding(mesh: Mesh) -> NamedSharding:
    """The second axis split over the replicas: batches of several steps, one upon the other."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Refuses a global batch that the replicas cannot share evenly."""
    replicas = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch_size % replicas:
        raise ValueError(
            f"batch size {batch_size} must divide over data x fsdp = {replicas}; "
            f"take a multiple of {replicas} or another mesh"
        )


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """The sharding of each parameter, from the axis names that its model gave it.

    Args:
      boxed: a pytree whose leaves are `nn.LogicallyPartitioned` arrays or shapes, as
        `jax.eval_shape(module.init, ...)` returns them; leaves without names are replicated.
      mesh: the mesh.

    Returns:
      The same tree, unboxed, of `NamedSharding`.

    Raises:
      ValueError: if a mesh axis does not divide a parameter, naming both and the sizes that would.
    """

    def sharding(path, leaf):
        if not isinstance(leaf, nn.meta.AxisMetadata):
            return replicated(mesh)
        entries = [
            _mesh_axes(name, extent, mesh, path)
            for name, extent in zip(leaf.names, leaf.unbox().shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree_util.tree_map_with_path(
        sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )


def _mesh_axes(name: str, extent: int, mesh: Mesh, path: Any) -> tuple[str, ...] | None:
    axes = RULES[name]
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if extent % ways == 0:
        return axes or None
    if name in WHOLE_IF_UNEVEN:
        return None
    fitting = [n for n in range(1, extent + 1) if extent % n == 0 and n <= mesh.size]
    raise ValueError(
        f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}: axis {name!r} of "
        f"{extent} does not divide over mesh axis {'x'.join(axes)}={ways}; "
        f"sizes that would: {', '.join(map(str, fitting))}"
    )


def sharded(init: Callable[[], Any], mesh: Mesh) -> Callable[[], Any]:
    """A compiled `init` that makes each array where it will live, never whole on one device.

    Returns:
      A function of nothing, for what `init` returns, unboxed, sharded by the names of its boxes.
    """
    shardings = param_shardings(jax.eval_shape(init), mesh)
    compiled = jax.jit(lambda: nn.meta.unbox(init()), out_shardings=shardings)

    def run() -> Any:
        with use(mesh):
            return compiled()

    return run


def init_sharded(init: Callable[[], Any], mesh: Mesh) -> Any:
    """What `init` returns, unboxed and made where it will live (`sharded`)."""
    return sharded(init, mesh)()


def place(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a global batch, as global arrays."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
