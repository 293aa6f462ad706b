"""Commands that train, and that plan for machines one does not have."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from lineage_jax.cli.terminal import (
    UsageError,
    chosen_preset,
    exit_code,
    options,
    say,
    without_prefix,
)


def train(arguments: Sequence[str]) -> None:
    """`lineage train NAME --preset PRESET`: one run."""
    name, preset, experiment, rest = chosen_preset("train", arguments)

    from lineage_jax.train.processes import ProcessOptions, join

    flat: Any = without_prefix(type(experiment))
    others: Any = without_prefix(ProcessOptions)

    @dataclasses.dataclass(frozen=True)
    class Options:
        experiment: flat
        run_dir: str = os.path.join("runs", f"{name}-{preset}")
        """Where the run is written; gs:// works."""
        resume: bool = False
        """Go on from the last checkpoint in --run-dir, or start if there is none."""
        processes: others = dataclasses.field(default_factory=ProcessOptions)

    program = f"lineage train {name} --preset {preset}"
    chosen = options(Options, Options(experiment), rest, program)
    import jax

    from lineage_jax import sharding
    from lineage_jax.train import loop
    from lineage_jax.train.compilation import compilation_cache
    from lineage_jax.train.progress import Progress
    from lineage_jax.train.tracking import open_writers
    from lineage_jax.train.watch import Watch

    loop.check_run_dir(chosen.run_dir, chosen.experiment, chosen.resume)  # before any writes there
    config = chosen.experiment.train
    join(chosen.processes)
    with Watch(exit_code) as watch, compilation_cache(), Progress() as progress:
        mesh = sharding.make_mesh(chosen.experiment.mesh)
        result = loop.train(
            chosen.experiment.task(),
            config,
            mesh,
            chosen.run_dir,
            experiment=chosen.experiment,
            progress=progress,
            writers=open_writers(config.track, chosen.run_dir),
            watch=watch,
        )
    loss = "  ".join(f"{key} {value:.4f}" for key, value in result.evaluation.items())
    if jax.process_index() == 0:
        print(f"finished {config.num_steps} steps; held-out {loss}; written to {chosen.run_dir}")


def plan(arguments: Sequence[str]) -> None:
    """`lineage plan NAME --preset PRESET --topology v5p:8x8x8`: the step on a slice of TPUs."""
    name, preset, experiment, rest = chosen_preset("plan", arguments)
    flat: Any = without_prefix(type(experiment))

    @dataclasses.dataclass(frozen=True)
    class Options:
        experiment: flat
        topology: str | None = None
        """The slice, such as v5e:16x16 or v5p:8x8x8."""
        tokens: float | None = None
        """To train on, for the days and the cost; as many as the experiment does, if not given."""
        json: str | None = None
        """Where to write the plan."""
        search: bool = False
        """Try meshes, what is recomputed and batch sizes instead, and plan with the fastest: some
        60 sketches of ten seconds, and three compilations of minutes."""
        smallest: bool = False
        """Find the smallest slice of the --topology's chip that holds the step."""

    program = f"lineage plan {name} --preset {preset}"
    chosen = options(Options, Options(experiment), rest, program)
    if chosen.topology is None:
        raise UsageError("wanted --topology, such as v5e:16x16 or v5p:8x8x8")
    from lineage_jax.pods import SLICES, Request, Topology, make_plan
    from lineage_jax.pods import search as searches

    experiment, topology = chosen.experiment, Topology.parse(chosen.topology)
    tokens = chosen.tokens
    if tokens is None:
        tokens = float(experiment.train.num_steps * experiment.program().tokens_per_step)
    if chosen.search or chosen.smallest:
        slices = [topology]
        if chosen.smallest:
            name = topology.chip.name
            slices = [Topology.parse(f"{name}:{shape}") for shape in SLICES[name]]
        tried = searches.smallest(experiment, slices, tokens, say)
        if not tried or tried[0].plan is None:
            raise UsageError(f"nothing that was tried fits {slices[-1].name}; take a larger slice")
        made = tried[0].plan
        print("\n".join(["", "ranked:", *(one.line() for one in tried), ""]))
    else:
        accumulate = experiment.train.accumulate
        made = make_plan(Request(experiment.program, topology, experiment.mesh, accumulate), tokens)
    print("\n".join(made.lines()))
    if chosen.json:
        pathlib.Path(chosen.json).write_text(made.to_json())


def runs(arguments: Sequence[str]) -> None:
    """`lineage runs FOLDER`: the runs in a folder, and how each stands."""
    from lineage_jax.train.runs import TABLE, read_runs, row

    folder, rest = "runs", list(arguments)
    if rest and not rest[0].startswith("-"):
        folder = rest.pop(0)

    @dataclasses.dataclass(frozen=True)
    class Options:
        json: bool = False
        """As JSON, a list with all that is known of each run."""

    chosen = options(Options, Options(), rest, f"lineage runs {folder}")
    found = read_runs(folder)
    if chosen.json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*TABLE)
    for one in found:
        table.add_row(*row(one))
    Console(highlight=False, markup=False).print(table if found else f"no runs in {folder}")


def tokenizer(arguments: Sequence[str]) -> None:
    """`lineage tokenizer train --model unigram --path book.txt --out book.json`: a tokenizer."""
    if not arguments or arguments[0] != "train":
        raise UsageError("wanted `lineage tokenizer train`; add --help for its options")
    from lineage_jax.data.commands import TokenizerOptions, train_tokenizer_file

    defaults, program = TokenizerOptions(), "lineage tokenizer train"
    print(train_tokenizer_file(options(TokenizerOptions, defaults, arguments[1:], program), say))
