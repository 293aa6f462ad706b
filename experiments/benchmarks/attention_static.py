"""What attention takes on a TPU that is not there: bundles of instructions, times how often.

Each kernel is compiled alone by the real compiler, whose schedule fixes its bundles; what they are
multiplied by stands in `attention_counts`. The program with what XLA does around the kernels (pads,
turned arrays, sorted lists) is compiled besides: it says whether it fits, what memory it takes for
temporaries, and what XLA estimates for its own part.

Not in it: waiting for memory. A step of the grid is taken to find its tiles on the chip; where it
does not, a kernel takes longer than is said here, never less. A step is charged all copies that it
may begin. A chip is one JAX device: both cores of a v5p, one of the two of a TPU7x. Clocks are
those of `lineage_jax.pods.chips`, which are deduced from the peaks that are published.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import attention_table
from experiments.benchmarks.attention_counts import Counts, Shape, counts
from experiments.benchmarks.attention_programs import Program, program
from experiments.benchmarks.attention_table import DIRECTIONS, SPARSE
from lineage_jax.pods.aot import in_a_process
from lineage_jax.pods.bundles import STAGES, Listing, kernels, on_chip
from lineage_jax.pods.chips import CHIPS
from lineage_jax.pods.cost import Walk
from lineage_jax.pods.hlo import parse
from lineage_jax.pods.network import Torus
from lineage_jax.pods.topologies import Topology

TABLED = ("v5e", "v6e", "v5p", "tpu7x")
"""Chips of the tables."""
CORES = {"v5p": 2}
"""Cores of one device, that share the steps of a grid whose first axes are independent."""

RESULTS = Path(__file__).parents[1] / "results" / "attention_static.json"


class Around(Walk):
    """What a program does but for its kernels."""

    def seconds(self, cost, computation, one):
        if "tpu_custom_call" in one.attributes:
            return 0.0, False
        return super().seconds(cost, computation, one)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A program as it was compiled, with its kernels.

    Attributes:
      around: seconds that XLA estimates for what is not a kernel.
      temporaries: bytes.
      seconds: that compiling took here.
    """

    around: float
    temporaries: int
    seconds: float


def whole(asked: Program, topology: Topology) -> Whole:
    """Compiles a program for one chip, in a process of its own.

    Raises:
      ImportError: if libtpu is not installed.
      DoesNotFitError: if it does not fit in memory.
      RuntimeError: if the compiler fails otherwise.
    """
    return in_a_process(topology.chip.flags, functools.partial(whole_here, asked, topology))


def whole_here(asked: Program, topology: Topology) -> Whole:
    """`whole` in this process."""
    begin = time.perf_counter()
    compiled = on_chip(asked.function, asked.arguments, topology, "lower", asked.donate).compile()
    seconds = time.perf_counter() - begin
    torus = Torus(topology, ((0, 0, 0),))
    around = Around(parse(compiled.as_text()), torus, {"data": 1}).cost()
    return Whole(around.seconds, compiled.memory_analysis().temp_size_in_bytes, seconds)


def one_chip(name: str) -> Topology:
    """The smallest slice of a chip.

    Raises:
      ValueError: for an unknown chip.
    """
    dims = CHIPS[name].torus_dims if name in CHIPS else 2
    return Topology.parse(f"{name}:{'x'.join('1' * dims)}")


def milliseconds(listing: Listing, calls: Sequence[Counts], chip: str) -> float:
    """What all calls of a kernel take.

    Raises:
      ValueError: if it has other parts than are counted.
    """
    rounds, cores = listing.grid.rounds, CORES.get(chip, 1)
    if rounds == calls[0][0] + STAGES:
        cores = 1  # of a grid whose axes depend on one another
    cycles = sum(listing.cycles([n / cores for n in call]) for call in calls)
    return 1e3 * cycles / CHIPS[chip].clock


def kernels_of(branch: str, shape: Shape, topology: Topology) -> dict[str, dict[str, Any]]:
    """The kernels of a branch, forward and backward, and what they take.

    Raises:
      ImportError: if libtpu is not installed.
      ValueError: if a kernel has other parts than are counted.
      RuntimeError: if the compiler fails.
    """
    asked = program("backward", branch, shape)
    found = kernels(asked.function, asked.arguments, topology)
    often, told = counts(branch, shape), dict[str, dict[str, Any]]()
    for name, listing in found.items():
        if name not in often:
            raise ValueError(f"wanted counts of the kernels {', '.join(found)}, got none of {name}")
        try:
            took = milliseconds(listing, often[name], topology.chip.name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        forward = "forward" in name or "fwd" in name
        told[name] = {
            "direction": DIRECTIONS[0 if forward else 1],
            "milliseconds": round(took, 3),
            "spills": listing.spills,
            "bundles": listing.parts(),
            "counts": [sum(part) for part in zip(*often[name], strict=True)],
        }
    return told


def measure(branch: str, shape: Shape, topology: Topology, *, quick: bool) -> dict[str, Any]:
    """A branch forward and backward; if `quick`, or of splash attention, its kernels alone."""
    told: dict[str, Any] = {"kernels": kernels_of(branch, shape, topology)}
    for direction in DIRECTIONS:
        mine = [x for x in told["kernels"].values() if x["direction"] == direction]
        told[direction] = {
            "milliseconds": round(sum(x["milliseconds"] for x in mine), 3),
            "spills": sum(x["spills"] for x in mine),
        }
    if quick or branch == "splash":
        return told
    before = 0.0
    for direction in DIRECTIONS:
        try:
            one = whole(program(direction, branch, shape), topology)
        except (RuntimeError, ValueError) as error:
            told[direction]["refused"] = str(error)
            continue
        told[direction] |= as_told(one, before)
        before = one.around
    return told


def as_told(one: Whole, before: float = 0.0) -> dict[str, float]:
    """What is kept of a program, whose part before this one took so many seconds around."""
    return {
        "around": round(1e3 * max(0.0, one.around - before), 3),
        "temporaries": round(one.temporaries / 1e9, 3),
        "compile_seconds": round(one.seconds, 1),
    }


def measure_decode(shape: Shape, topology: Topology) -> dict[str, Any]:
    """A token of each row, without a kernel.

    What XLA does includes turning the cache as the program begins and as it ends, once for however
    many tokens are in it.
    """
    try:
        one = whole(program("decode", "", shape), topology)
    except (RuntimeError, ValueError) as error:
        return {"refused": str(error)}
    return as_told(one)


def record(
    args: argparse.Namespace, chips: Sequence[str], known: Mapping[str, Any]
) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    """Measures what is asked for, one branch of one length of one chip after another.

    Args:
      args: of the command.
      chips: names.
      known: a record. What is measured takes the place of what it has; if `args.quick`, what it
        has of whole programs stays.

    Yields:
      What was measured, and the record with it.
    """
    told = json.loads(json.dumps(known))
    for chip in chips:
        of_chip = told.setdefault(chip, {})
        of_chip |= {"date": datetime.date.today().isoformat(), "versions": versions()}
        for length in args.lengths:
            shape, mine = shape_of(args, length), of_chip.setdefault("lengths", {})
            mine = mine.setdefault(str(length), {})
            for branch in args.branches:
                if branch == "decode":
                    if args.quick:
                        continue
                    mine[branch] = measure_decode(shape, one_chip(chip))
                else:
                    found = measure(branch, shape, one_chip(chip), quick=args.quick)
                    if args.quick and branch in mine:
                        for direction in DIRECTIONS:
                            found[direction] = mine[branch][direction] | found[direction]
                    mine[branch] = found
                yield chip, length, branch, told


def shape_of(args: argparse.Namespace, length: int) -> Shape:
    """What the command asks for."""
    return Shape(
        length=length,
        heads=args.heads,
        groups=args.groups,
        width=args.width,
        value_width=args.value_width,
        selection=args.selection,
    )


def main(args: argparse.Namespace) -> None:
    """Prints the table, and stores it as it comes where it is asked for.

    Raises:
      ValueError: for an unknown chip; for another shape than the paper's to store; if a kernel has
        other parts than are counted.
      ImportError: if libtpu is not installed.
      RuntimeError: if the compiler fails on a kernel.
    """
    chips = TABLED if args.static == ["all"] else args.static
    for chip in chips:
        if chip not in TABLED:
            raise ValueError(f"wanted chips of {', '.join(TABLED)}, or all, got {chip!r}")
    if args.store and shape_of(args, 0) != Shape(length=0):
        raise ValueError("wanted the paper's shape and random selections to --store")
    known = json.loads(RESULTS.read_text()) if args.store and RESULTS.exists() else {}
    paths = [args.json] if args.json else []
    paths += [RESULTS] if args.store else []
    print(attention_table.HEAD)

    told: Mapping[str, Any] = known
    for chip, length, branch, told in record(args, chips, known):
        for path in paths:
            path.write_text(json.dumps(told, indent=1) + "\n")
        of_length = told[chip]["lengths"][str(length)]
        print(*attention_table.lines(chip, length, branch, of_length), sep="\n", flush=True)
        if branch == args.branches[-1] and set(SPARSE) <= set(of_length):
            of_length = attention_table.with_sum(of_length)
            print(*attention_table.lines(chip, length, "sparse", of_length), sep="\n", flush=True)
    if args.store:
        attention_table.write(told)


def versions() -> dict[str, str]:
    """Of what decides the bundles."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
