"""Parameters under their Hugging Face names, as ours, and back: what a table of names says.

Reading is made of `jax.numpy` alone, so that a gradient with respect to their tensors is `jax.grad`
through it: fused, transposed, scaled and tied parameters need no rule of their own.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one of our parameters is found.

    Attributes:
      name: theirs, with {} for the layer's number where there is one per layer.
      transposed: whether theirs is (outputs, inputs), as `torch.nn.Linear` holds it.
      third: which third of theirs, along its last axis, ours is.
      scale: ours is theirs times this.
      row: whether theirs is a matrix of one row, where ours is a vector.
    """

    name: str
    transposed: bool = False
    third: int | None = None
    scale: float = 1.0
    row: bool = False

    def read(self, tensor: Any) -> jax.Array:
        """Ours from theirs, but for the split of its axes."""
        tensor = jnp.asarray(tensor)
        if self.third is not None:
            tensor = jnp.split(tensor, 3, axis=-1)[self.third]
        if self.transposed:
            tensor = tensor.T
        return tensor if self.scale == 1 else self.scale * tensor

    def write(self, ours: jax.Array, path: str) -> jax.Array:
        """Theirs, or the third of it, from one layer's ours."""
        before, _, kind = path.rpartition("/")
        if kind == "kernel":
            width_in = math.prod(ours.shape[:-1] if before.endswith("/out") else ours.shape[:1])
            ours = ours.reshape(width_in, -1)
        elif kind == "bias":
            ours = ours.ravel()
        if self.transposed:
            ours = ours.T
        if self.row:
            ours = ours[None]
        return ours if self.scale == 1 else ours / self.scale


Table = Mapping[str, Tensor]
"""Our path of a parameter, joined by slashes -> where it is found.

A path with "blocks/" in it has all layers, one upon the other. A bias that is in no table is one
that they do not have: zero.
"""


def names(table: Table, shapes: Mapping[str, Any]) -> Iterator[str]:
    """Theirs, of every tensor that the table reads.

    Args:
      table: of the architecture.
      shapes: our parameters by their paths, for the number of layers.
    """
    for path, row in table.items():
        yield from layer_names(row, path, shapes[path].shape)


def layer_names(row: Tensor, path: str, shape: tuple[int, ...]) -> list[str]:
    """Theirs, of each layer of one of our parameters."""
    return [row.name.format(layer) for layer in range(shape[0])] if stacked(path) else [row.name]


def stacked(path: str) -> bool:
    """Whether one of our parameters has a leading axis of layers."""
    return "blocks/" in path


def to_ours(table: Table, shapes: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameters, a nested dict, from their tensors.

    Args:
      table: of the architecture.
      shapes: our parameters by their paths.
      tensors: theirs by name.

    Raises:
      ValueError: if a tensor is missing or has another size, or one is wanted by no parameter.
    """
    wanted = dict.fromkeys(names(table, shapes))
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(f"wanted tensors {listed(missing)}, which are not there")
    if unused := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"no parameter is called {listed(unused)}")

    def read(path: str, shape: tuple[int, ...]) -> jax.Array:
        if path not in table:
            assert path.endswith("bias"), path
            return jnp.zeros(shape)
        row, one = table[path], shape[1:] if stacked(path) else shape
        layers = []
        for name in layer_names(row, path, shape):
            layer = row.read(tensors[name])
            if layer.size != math.prod(one):
                raise ValueError(
                    f"wanted {name} to make {path}, {one} for a layer, got {tensors[name].shape}"
                )
            layers.append(layer.reshape(one))
        return jnp.stack(layers) if stacked(path) else layers[0]

    ours = {path: read(path, leaf.shape) for path, leaf in shapes.items()}
    return unflatten_dict(ours, sep="/")


def to_theirs(table: Table, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Their tensors by name, from our parameters.

    Raises:
      ValueError: if they have no place for a parameter that is not zero.
    """
    ours: dict[str, Any] = flatten_dict(params, sep="/")
    found: dict[str, jax.Array] = {}
    thirds: dict[str, dict[int, jax.Array]] = {}
    for path, leaf in ours.items():
        if path not in table:
            if jnp.any(leaf):
                raise ValueError(f"{path} is not zero, and has no place in that architecture")
            continue
        row = table[path]
        layers = leaf if stacked(path) else leaf[None]
        for name, layer in zip(layer_names(row, path, leaf.shape), layers, strict=True):
            if row.third is None:
                found[name] = row.write(layer, path)
            else:
                thirds.setdefault(name, {})[row.third] = row.write(layer, path)
    for name, parts in thirds.items():
        found[name] = jnp.concatenate([parts[i] for i in range(3)], axis=-1)
    return found


def listed(found: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
