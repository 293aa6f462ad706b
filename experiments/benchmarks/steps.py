"""Training steps a second of every milestone: `python -m experiments.benchmarks.steps`.

Each smallest preset at its own batch, random tokens, on this machine's first device. They take
turns, so that whatever else the machine does falls on all; a table of medians.
"""

import argparse
import importlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.random_batch import random_batch

STEPS = 5  # of one call of a compiled program, as `lineage train` has it on CPU


def block(experiment: Any) -> Callable[[], None]:
    """Takes `STEPS` steps of training, compiled when it is first called."""
    import jax

    from lineage_jax import sharding

    mesh = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    program = experiment.program()
    state = program.initial_state(mesh, seed=0)
    made = [random_batch(experiment, seed) for seed in range(STEPS)]
    stacked = {name: np.stack([one[name] for one in made]) for name in made[0]}
    batches = sharding.Feed(program.batch, mesh).stack(stacked)
    rates, steps = np.full(STEPS, 1e-4, np.float32), program.train_steps(mesh)

    def run() -> None:
        nonlocal state
        with sharding.use(mesh):
            state, metrics = steps(state, batches, rates)
        jax.block_until_ready(metrics)

    return run


def measure(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Of each milestone its parameters, tokens a step, and seconds of each round's step."""
    import jax

    runs, found = {}, []
    for name in names:
        experiment = importlib.import_module(f"experiments.{name}").experiment("tiny")
        runs[name], program = block(experiment), experiment.program()
        runs[name]()
        params, _ = jax.eval_shape(program.init, jax.random.key(0))
        found.append(
            {
                "milestone": name,
                "params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
                "tokens_per_step": program.tokens_per_step,
                "seconds": [],
            }
        )
    for _ in range(rounds):
        for one in found:
            began = time.perf_counter()
            runs[one["milestone"]]()
            one["seconds"].append((time.perf_counter() - began) / STEPS)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    from lineage_jax.lineage import LINEAGE

    names = [one.name for one in LINEAGE]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--milestones", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(arguments)
    found = measure(args.milestones, args.rounds)
    import jax

    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}\n")
    print("| milestone | parameters | tokens a step | steps a second | tokens a second |")
    print("|---|---|---|---|---|")
    for one in found:
        rate = 1 / float(np.median(one["seconds"]))
        tokens = one["tokens_per_step"]
        row = (one["milestone"], f"{one['params']:,}", f"{tokens:,}")
        print(f"| {' | '.join(row)} | {rate:.1f} | {rate * tokens:,.0f} |")
    if args.json:
        versions = {"python": platform.python_version(), "jax": jax.__version__}
        args.json.write_text(json.dumps({"versions": versions, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
