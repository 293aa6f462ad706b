"""A sweep of two tiny sizes, run as a process by tests/scaling/test_sweep.py."""

import dataclasses
import os
import pathlib
import sys

from experiments.laptop import laptop
from lineage_jax.sharding import MeshConfig, make_mesh
from lineage_jax.train.progress import Progress
from scaling.runs import write_runs
from scaling.sweep import Sweep, run, runs_table
from scaling.workers import share


def tiny_sweep(**changes) -> Sweep:
    full = laptop()
    sizes = tuple(dataclasses.replace(size, budgets=(20, 50, 100)) for size in full.sizes[:2])
    return dataclasses.replace(full, name="tiny", sizes=sizes, eval_batches=2, **changes)


def run_tiny(folder: str, num_workers: int = 1, **changes) -> None:
    sweep = tiny_sweep(**changes)
    with Progress() as progress:
        if num_workers > 1:
            share(tiny_sweep, folder, progress, num_workers=num_workers)
        else:
            run(sweep, folder, make_mesh(MeshConfig(data=1, fsdp=-1)), progress)
    runs, _, _ = runs_table(sweep, folder)
    write_runs(runs, pathlib.Path(folder) / "results.csv")


def use_cores(number: int) -> None:
    """Pins this process to so many cores: with as many each, workers' results are the same bits."""
    cores = sorted(os.sched_getaffinity(0))
    first = os.getpid() % len(cores)
    os.sched_setaffinity(0, [cores[(first + i) % len(cores)] for i in range(number)])


if __name__ == "__main__":
    folder, num_workers, lanes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    use_cores(num_workers)
    run_tiny(folder, num_workers, lanes=lanes)
