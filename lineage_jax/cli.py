"""The command line: `lineage train`, `lineage sweep`, `lineage fit`, `lineage list`, ...

Thin: each command reads its options, calls one function and prints what came back. Heavy imports
wait until a command needs them, so that `lineage --help` answers at once.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import logging
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

from lineage_jax import lineage

T = TypeVar("T")

USAGE = """\
lineage: the lineage of modern AI in JAX, and its scaling laws

  lineage list                      the milestones, as a table
  lineage show gpt                  one milestone: its paper, its parents, its files
  lineage diff gpt llama            what a child changed: settings, parameters, cost
  lineage train gpt --preset tiny   train one (every setting is an option: add --help)
  lineage generate runs/gpt-tiny --prompt "Once"    what a model says; a Hugging Face folder too
  lineage translate runs/transformer-tiny           the lines of standard input, translated
  lineage evaluate runs/transformer-tiny            perplexity, bits per byte, BLEU
  lineage evaluate runs/gpt-tiny --few-shot t.jsonl a task, with examples of it in the context
  lineage convert runs/gpt-tiny folder              weights for Hugging Face's library
  lineage attention runs/gpt-tiny --text "Once"     where each head looks, as a page
  lineage runs                      the runs in a folder: which are under way, which went wrong
  lineage claim bahdanau            measure what its paper is known for (--quick: only that it runs)
  lineage claims --table            what was measured so far
  lineage plan gpt --preset gpt3_175b --topology v5p:8x8x8   what a slice you do not have would do
  lineage tokenizer train --model bpe --path book.txt   a tokenizer of your own text
  lineage sweep laptop              train many sizes, fit the scaling laws, write a report
  lineage plan-sweep --flops-min 1e15 --flops-max 1e18   a sweep of yours: sizes, time, cost
  lineage fit RUNS.csv              fit the scaling laws to anybody's runs
  lineage optimal FIT.json --flops 1e21   the best model and tokens for some compute
  lineage launch FIT.json --flops 1e24 --chip v5p   the same as a run: shape, slice, days, cost

Add --help to any command for its options, and --debug to see where an error came from.
Start with `lineage train gpt --preset tiny` (minutes) or `lineage sweep laptop` (a quarter of an
hour).
"""

EXIT_IO, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class UsageError(ValueError):
    """Something on the command line was not as wanted."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. An error that a caller can mend is one line, exit code 2, or 1 for I/O."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    try:
        with contextlib.nullcontext() if debug else silent_libraries():
            command(arguments[0])(arguments[1:])
    except KeyboardInterrupt as stop:
        fail("stopped; run the same command again to go on", exit_code(stop))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        report(error, debug, exit_code(error))


def exit_code(error: BaseException) -> int:
    """That of a command which ends in that error."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, ValueError):
        return EXIT_USAGE
    return EXIT_IO  # divergence too, and the device's own errors, such as no memory left


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """Keeps threads of libraries from logging an error that is raised, and told in one line."""
    hooks = threading.excepthook, sys.unraisablehook, sys.excepthook
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda arguments: None
    sys.unraisablehook = lambda arguments: None
    sys.excepthook = lambda *arguments: None  # what a callback from C raises comes here
    try:
        yield
    except BaseException:  # asyncio logs what failed with it when that is collected: later
        logging.getLogger("asyncio").disabled = True
        raise
    finally:
        logging.disable(logging.NOTSET)
        threading.excepthook, sys.unraisablehook, sys.excepthook = hooks


def command(name: str) -> Callable[[list[str]], None]:
    """The function behind a command's name."""
    commands = {
        "list": list_,
        "show": show,
        "diff": diff,
        "train": train,
        "generate": generate,
        "translate": translate,
        "evaluate": evaluate,
        "convert": convert,
        "attention": attention,
        "runs": runs,
        "claim": claim,
        "claims": claims,
        "plan": plan,
        "sweep": sweep,
        "plan-sweep": plan_sweep,
        "tokenizer": tokenizer,
        "fit": fit,
        "optimal": optimal,
        "launch": launch,
    }
    return pick("command", name, commands, hint="`lineage --help` shows them all")


def pick(kind: str, name: str, choices: dict[str, T], hint: str = "") -> T:
    """The choice of that name, or a `UsageError` that names the closest."""
    import difflib

    if name not in choices:
        close = difflib.get_close_matches(name, choices, n=2)
        meant = f"did you mean {' or '.join(close)}?" if close else f"have {', '.join(choices)}"
        raise UsageError(f"no {kind} is called {name!r}; {meant}{'; ' + hint if hint else ''}")
    return choices[name]


def report(error: Exception, debug: bool, code: int) -> NoReturn:
    """One line of an error, or all of it under --debug."""
    if debug:
        traceback.print_exception(error)
    text = str(error).strip() or type(error).__name__
    fail(" ".join(text.split()) if len(text) < 500 else text.splitlines()[0], code)


def fail(line: str, code: int) -> NoReturn:
    print(f"lineage: {line}", file=sys.stderr)
    raise SystemExit(code)


def options(kind: type[T], default: T, arguments: Sequence[str], program: str) -> T:
    """Reads a config from the command line; what it cannot read is a `UsageError` of one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(kind, default=default, args=list(arguments), prog=program)
    except SystemExit as stop:
        if not stop.code:
            print(said.getvalue(), end="")
            raise
    lines = [line.strip(" │╭╰─╮╯") for line in said.getvalue().splitlines()]
    noise = ("For full help", "Argument helptext", "(default", "---")
    told = [line for line in lines[1:] if line and not line.startswith(noise)]
    raise UsageError(f"{' '.join(told)} (`{program} --help` shows every option)")


@contextlib.contextmanager
def compilation_cache() -> Iterator[None]:
    """Keeps compiled programs between starts; JAX_COMPILATION_CACHE_DIR says where."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(caches, "lineage_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    yield


def list_(arguments: Sequence[str]) -> None:
    """`lineage list`: the milestones as a table."""
    if arguments:
        raise UsageError(f"`lineage list` takes nothing, got {' '.join(arguments)}")
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "milestone", "year", "what is new", "parents")
    for one in lineage.LINEAGE:
        table.add_row(one.name, one.title, str(one.year), one.new, ", ".join(one.parents))
    Console(highlight=False).print(table)


def show(arguments: Sequence[str]) -> None:
    """`lineage show NAME`: one milestone and the tree of its parents."""
    if len(arguments) != 1:
        raise UsageError("wanted `lineage show NAME`; `lineage list` has the names")
    from rich.console import Console
    from rich.tree import Tree

    one = lineage.find(arguments[0])
    say = Console(highlight=False, soft_wrap=True).print
    say(f"{one.title} ({one.year}): {one.new}\n{one.paper}\n{one.url}\n")
    say(f"model       {one.module.replace('.', '/')}.py")
    say(f"experiment  experiments/{one.name}.py   `lineage train {one.name} --help`")
    presets = ", ".join(importlib.import_module(f"experiments.{one.name}").PRESETS)
    say(f"presets     {presets}")
    if one.notebook:
        say(f"notebook    {one.notebook}")
    say("proved      " + "\n            ".join(one.proved) + "\n")

    def tree(milestone: lineage.Milestone, node: Tree) -> None:
        for parent in map(lineage.find, milestone.parents):
            tree(parent, node.add(f"{parent.title} ({parent.year})"))

    root = Tree(f"{one.title} ({one.year})")
    tree(one, root)
    say(root)


def diff(arguments: Sequence[str]) -> None:
    """`lineage diff PARENT CHILD [--preset PRESET]`: what the child changed."""
    names = list(arguments)
    preset = take_option(names, "--preset", "")
    if len(names) != 2:
        raise UsageError("wanted `lineage diff PARENT CHILD`; `lineage list` has the names")
    from rich.console import Console
    from rich.table import Column, Table

    from experiments.difference import difference

    parent, child = names
    table, part = Table(Column("", no_wrap=True), parent, child), ""
    for row in difference(parent, child, preset or None):
        if row.part != part:
            table.add_section()
            part = row.part
        table.add_row(row.name, row.left, row.right)
    Console(highlight=False, markup=False).print(table)


def train(arguments: Sequence[str]) -> None:
    """`lineage train NAME --preset PRESET`: one run."""
    name, preset, experiment, rest = chosen_preset("train", arguments)

    from lineage_jax.train.processes import ProcessOptions, join

    flat: Any = _without_prefix(type(experiment))
    others: Any = _without_prefix(ProcessOptions)

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
    flat: Any = _without_prefix(type(experiment))

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


def chosen_preset(program: str, arguments: Sequence[str]) -> tuple[str, str, Any, list[str]]:
    """Reads `NAME --preset PRESET`: both, that experiment, and the arguments that are left."""
    names = {one.name: one for one in lineage.LINEAGE}
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"wanted `lineage {program} NAME`, NAME one of {', '.join(names)}")
    name, rest = arguments[0], list(arguments[1:])
    pick("milestone", name, names, hint="`lineage list` shows them all")
    presets = importlib.import_module(f"experiments.{name}").PRESETS
    preset = take_option(rest, "--preset", next(iter(presets)))
    return name, preset, pick("preset", preset, presets)(), rest


def _without_prefix(kind: type) -> Any:
    """A field of that type whose own fields are options without the field's name before them."""
    import tyro

    return Annotated[kind, tyro.conf.arg(name="")]


def take_option(arguments: list[str], flag: str, default: str) -> str:
    """Takes `--flag VALUE` or `--flag=VALUE` out of the arguments."""
    for i, argument in enumerate(arguments):
        if argument == flag:
            if i + 1 == len(arguments):
                raise UsageError(f"{flag} wants a value")
            del arguments[i]
            return arguments.pop(i)
        if argument.startswith(f"{flag}="):
            return arguments.pop(i).split("=", 1)[1]
    return default


def generate(arguments: Sequence[str]) -> None:
    """`lineage generate RUN_OR_FOLDER --prompt TEXT`: what a language model says."""
    folder, rest = of_a_folder("generate", arguments)
    from experiments.speaking import GenerateOptions, generate_text

    program = f"lineage generate {folder}"
    chosen = options(GenerateOptions, GenerateOptions(), rest, program)
    with compilation_cache():
        for piece in generate_text(folder, chosen):
            print(piece, end="", flush=True)
    print()


def translate(arguments: Sequence[str]) -> None:
    """`lineage translate RUN_OR_FOLDER --text SENTENCE`: a translator at work."""
    folder, rest = of_a_folder("translate", arguments)
    from experiments.speaking import TranslateOptions, translate_lines

    program = f"lineage translate {folder}"
    chosen = options(TranslateOptions, TranslateOptions(), rest, program)
    sentences = list(chosen.text) or [line.rstrip("\n") for line in sys.stdin]
    with compilation_cache():
        for line in translate_lines(folder, sentences, chosen):
            say(line)


def evaluate(arguments: Sequence[str]) -> None:
    """`lineage evaluate RUN_OR_FOLDER`: how good a model is."""
    folder, rest = of_a_folder("evaluate", arguments)
    from experiments.evaluation import EvaluateOptions
    from experiments.evaluation import evaluate as evaluated

    @dataclasses.dataclass(frozen=True)
    class Options:
        on: _without_prefix(EvaluateOptions) = dataclasses.field(default_factory=EvaluateOptions)
        json: bool = False
        """As JSON, on one line."""

    chosen = options(Options, Options(), rest, f"lineage evaluate {folder}")
    with compilation_cache():
        found = evaluated(folder, chosen.on, lambda line: print(line, file=sys.stderr))
    if chosen.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:20} {value:.4f}")


def convert(arguments: Sequence[str]) -> None:
    """`lineage convert RUN_OR_FOLDER FOLDER`: weights for Hugging Face's library."""
    if len(arguments) != 2 or arguments[0].startswith("-"):
        raise UsageError("wanted `lineage convert RUN_OR_FOLDER FOLDER`")
    from experiments import speaking

    print(speaking.convert(*arguments))


def attention(arguments: Sequence[str]) -> None:
    """`lineage attention RUN_OR_FOLDER --text TEXT --out attention.html`: where each head looks."""
    folder, rest = of_a_folder("attention", arguments)

    @dataclasses.dataclass(frozen=True)
    class Options:
        text: str
        """To be read; of a translator, the source."""
        target: str | None = None
        """Of a translator, the translation; its own, if not given."""
        out: str = "attention.html"
        """The page to write."""

    import tyro

    missing: Any = tyro.MISSING_NONPROP
    chosen = options(Options, missing, rest, f"lineage attention {folder}")
    from experiments.attention_maps import attention_maps, page

    with compilation_cache():
        maps = attention_maps(folder, chosen.text, chosen.target)
    pathlib.Path(chosen.out).write_text(page(maps, f"{folder}: {chosen.text}"))
    heads = sum(one.weights.shape[0] * one.weights.shape[1] for one in maps)
    print(f"{chosen.out}: {heads} heads")


def of_a_folder(program: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Reads `RUN_OR_FOLDER --option ...`: the folder, and the rest."""
    if list(arguments) == ["--help"]:
        return "RUN_OR_FOLDER", ["--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(
            f"wanted `lineage {program} FOLDER`, a run of `lineage train` or a Hugging Face folder"
        )
    return arguments[0], list(arguments[1:])


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


def claim(arguments: Sequence[str]) -> None:
    """`lineage claim NAME [--quick]`, or `lineage claim --all`: what a paper is known for."""
    known = {one.name: one.claims for one in lineage.LINEAGE}
    known |= {name: (name,) for claims in known.values() for name in claims}
    name, rest = "", list(arguments)
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        pick("milestone or claim", name, known, hint="`lineage list` shows milestones")

    @dataclasses.dataclass(frozen=True)
    class Options:
        all: bool = False
        """Every claim, one after the other."""
        quick: bool = False
        """A few updates of two seeds: shows that it runs, and says nothing of the paper."""
        dir: str | None = None
        """Where what was run is kept, to go on after a kill: runs/claims, or runs/claims-quick."""

    chosen = options(Options, Options(), rest, f"lineage claim {name or 'NAME'}")
    if chosen.all == bool(name):
        raise UsageError("wanted `lineage claim NAME` or `lineage claim --all`")
    chosen_claims = [each for one in lineage.LINEAGE for each in one.claims]
    if name:
        chosen_claims = list(known[name])
    if not chosen_claims:
        raise UsageError(f"{name} has no claim yet")
    from experiments.study import Study

    folder = chosen.dir or os.path.join("runs", "claims-quick" if chosen.quick else "claims")
    study = Study(folder=pathlib.Path(folder), quick=chosen.quick, say=say)
    with compilation_cache():
        for each in chosen_claims:
            module = importlib.import_module(f"experiments.claims.{each}")
            say("\n".join(module.claim(study).lines()))


def claims(arguments: Sequence[str]) -> None:
    """`lineage claims`: the claims that were measured, and how each came out."""
    from experiments.study import RESULTS, markdown_table, read_claims

    @dataclasses.dataclass(frozen=True)
    class Options:
        table: bool = False
        """As the table in the README."""
        dir: str = str(RESULTS)
        """Where they are."""

    chosen = options(Options, Options(), arguments, "lineage claims")
    found = read_claims(pathlib.Path(chosen.dir))
    if chosen.table:
        print(markdown_table(found))
    else:
        print("\n\n".join("\n".join(one.lines()) for one in found) or f"none in {chosen.dir}")


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


def tokenizer(arguments: Sequence[str]) -> None:
    """`lineage tokenizer train --model unigram --path book.txt --out book.json`: a tokenizer."""
    if not arguments or arguments[0] != "train":
        raise UsageError("wanted `lineage tokenizer train`; add --help for its options")
    from lineage_jax.data.commands import TokenizerOptions, train_tokenizer_file

    defaults, program = TokenizerOptions(), "lineage tokenizer train"
    print(train_tokenizer_file(options(TokenizerOptions, defaults, arguments[1:], program), say))


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


def say(line: str) -> None:
    """Prints a line that is wanted now: the next may take minutes."""
    print(line, flush=True)


def of_a_fit(program: str, kind: type[T], arguments: Sequence[str]) -> tuple[str, T]:
    """Reads `FIT.json --flops C ...`: the fit's path, and the options."""
    if list(arguments) == ["--help"]:
        arguments = ["FIT.json", "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"wanted `lineage {program} FIT.json --flops 1e24`, a fit on disk")
    import tyro

    path, missing = arguments[0], tyro.MISSING_NONPROP
    return path, options(kind, missing, arguments[1:], f"lineage {program} {path}")


if __name__ == "__main__":
    main()
