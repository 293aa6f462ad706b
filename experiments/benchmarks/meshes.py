"""How far a mesh is from one device: `python -m experiments.benchmarks.meshes`.

Eight devices on this machine's CPU, every milestone's smallest preset, initial weights, random
tokens in documents or sentences of random length, float32. A table of the largest differences.
"""

import argparse
import dataclasses
import importlib
import math
import os
from typing import Any

import numpy as np

from experiments.benchmarks.random_batch import random_batch

ROWS, LENGTH = 16, 64
NOTHING = 1e-6
"""Share of the whole gradient's norm below which one is of rounding errors."""
SIZES: tuple[dict[str, int], ...] = (
    dict(data=8),
    dict(data=2, fsdp=4),
    dict(data=2, fsdp=2, tensor=2),
    dict(data=1, fsdp=2, context=2, tensor=2),
    dict(data=2, expert=2, context=2),
    dict(data=2, stage=2, tensor=2),
    dict(data=1, stage=2, fsdp=2, context=2),
)


def shortened(experiment: Any) -> Any:
    """The experiment with `ROWS` rows, of `LENGTH` tokens where its model reads as many."""
    fields = {field.name for field in dataclasses.fields(experiment.data)}
    sizes = {"batch_size": ROWS} | ({"seq_len": LENGTH} if "seq_len" in fields else {})
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **sizes))


def loss_and_gradients(experiment: Any, sizes: dict[str, int], devices: Any) -> tuple[float, Any]:
    """The mean loss of a batch on a mesh, and the gradients, on the host."""
    import jax

    from lineage_jax import sharding

    mesh, program = sharding.make_mesh(sharding.MeshConfig(**sizes), devices), experiment.program()
    state = program.initial_state(mesh, seed=0)
    rows = sharding.Feed(program.batch, mesh)(random_batch(experiment))

    def loss(params: Any) -> Any:
        return program.eval_loss_fn(params, state.extra, rows, jax.random.key(0))[0]

    with sharding.use(mesh):
        value, gradients = jax.jit(jax.value_and_grad(loss))(state.params)
    return float(value), jax.tree.map(np.asarray, gradients)


def largest(found: Any, expected: Any) -> tuple[float, str]:
    """The largest relative distance of two gradients of one parameter, and which it is.

    Left out are parameters on which nothing depends, as attention does not on the bias of its keys:
    their gradients are rounding errors.
    """
    import jax

    whole = math.hypot(*map(np.linalg.norm, jax.tree.leaves(expected)))

    def distance(path: Any, one: np.ndarray, other: np.ndarray) -> tuple[float, str]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        norm = float(np.linalg.norm(other))
        return (0.0 if norm < NOTHING * whole else float(np.linalg.norm(one - other)) / norm), name

    every = jax.tree_util.tree_map_with_path(distance, found, expected)
    return max(jax.tree.leaves(every, is_leaf=lambda leaf: isinstance(leaf, tuple)))


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of what XLA does in moving between splits
    import jax

    from lineage_jax.lineage import LINEAGE

    print("| milestone | mesh | loss, relative | largest of a gradient, relative | of |")
    print("|---|---|---|---|---|")
    for milestone in LINEAGE:
        module = importlib.import_module(f"experiments.{milestone.name}")
        tiny = shortened(module.experiment("tiny"))
        loss, gradients = loss_and_gradients(tiny, dict(data=1), jax.devices()[:1])
        for sizes in SIZES:
            found, others = loss_and_gradients(tiny, sizes, None)
            distance, name = largest(others, gradients)
            mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
            print(
                f"| {milestone.name} | {mesh} | {abs(found / loss - 1):.1e} | {distance:.1e} "
                f"| `{name}` |",
                flush=True,
            )


if __name__ == "__main__":
    main()
