"""Commands about scaling laws: sweeps, fits, and what follows from them."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from lineage_jax.cli.terminal import UsageError, of_a_fit, options, pick, say


def sweep(arguments: Sequence[str]) -> None:
    """`lineage sweep NAME` or `lineage sweep PLAN.json`: a sweep, its fits and its report."""
    from experiments.laptop import SWEEPS
    from experiments.planned import planned, repetition

    if not arguments or arguments[0].startswith("-"):
        raise UsageError(
            f"wanted `lineage sweep NAME`, NAME one of {', '.join(SWEEPS)}, or a plan's PLAN.json"
        )
    name = arguments[0]
    if name.endswith(".json"):
        spec: Callable[[], Any] = functools.partial(planned, name)
    else:
        spec = pick("sweep", name, SWEEPS, hint="or name a plan, PLAN.json")

    @dataclasses.dataclass(frozen=True)
    class Options:
        dir: str = os.path.join("sweeps", pathlib.Path(name).stem)
        """Where the sweep is written. On a folder that machines share, the same command on each
        of them shares the work."""
        workers: int | None = None
        """Processes that share the work here; if not given, one for each core of a CPU, up to 4,
        and one on an accelerator."""
        bootstrap: int = 1000
        """Resamples behind each interval."""

        def __post_init__(self):
            if self.workers is not None and self.workers < 1:
                raise ValueError(f"workers must be at least 1, got {self.workers}")

    chosen = options(Options, Options(), arguments[1:], f"lineage sweep {name}")
    from lineage_jax import sharding
    from lineage_jax.train.compilation import compilation_cache
    from lineage_jax.train.progress import Progress
    from scaling import sweep as sweeps
    from scaling.publish import publish
    from scaling.workers import default_workers, share

    with compilation_cache(), Progress() as progress:
        plan, num_workers = spec(), chosen.workers or default_workers()
        if repeated := repetition(plan):
            progress.say(f"warning: {repeated}")
        if num_workers > 1:
            sweeps.Folder(pathlib.Path(chosen.dir), plan)  # refuses another sweep's folder at once
            share(spec, chosen.dir, progress, num_workers=num_workers)
        else:
            mesh = sharding.make_mesh(sharding.MeshConfig())
            sweeps.run(plan, chosen.dir, mesh, progress)
        lines = publish(plan, chosen.dir, bootstrap=chosen.bootstrap)
    print("\n".join(lines))


def plan_sweep(arguments: Sequence[str]) -> None:
    """`lineage plan-sweep --flops-min C --flops-max C`: a sweep's grid, its time and its cost."""
    import tyro
    from rich.console import Console

    from scaling.plan import PlanOptions, plan_file

    chosen = options(PlanOptions, tyro.MISSING_NONPROP, arguments, "lineage plan-sweep")
    console = Console(highlight=False, markup=False)
    for part in plan_file(chosen):
        console.print(part)


def fit(arguments: Sequence[str]) -> None:
    """`lineage fit RUNS.csv`: the scaling laws of anybody's runs."""
    if not arguments or arguments[0].startswith("-"):
        raise UsageError("wanted `lineage fit RUNS`, a .csv, .parquet or .jsonl of finished runs")
    from scaling.commands import FitOptions, fit_file

    chosen = options(FitOptions, FitOptions(), arguments[1:], f"lineage fit {arguments[0]}")
    print("\n".join(fit_file(arguments[0], chosen)))


def optimal(arguments: Sequence[str]) -> None:
    """`lineage optimal FIT.json --flops C`: the best model and tokens for some compute."""
    from scaling.commands import OptimalOptions, optimal_file

    path, chosen = of_a_fit("optimal", OptimalOptions, arguments)
    print("\n".join(optimal_file(path, chosen)))


def launch(arguments: Sequence[str]) -> None:
    """`lineage launch FIT.json --flops C --chip v5p`: shape, slice, mesh, days, cost and loss."""
    from experiments.launch import LaunchOptions, launch_file

    path, chosen = of_a_fit("launch", LaunchOptions, arguments)
    print("\n".join(launch_file(path, chosen, say)))
