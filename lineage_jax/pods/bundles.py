"""How many instructions a TPU takes for a Pallas kernel, from its compiler's own listing.

A bundle holds the instructions of one cycle, and the compiler fixes them all: bundles times trips
is the time of a kernel, but for what it waits for memory. No device is needed, and two compilations
of one kernel by one libtpu agree.
"""

import dataclasses
import functools
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from lineage_jax.pods.aot import in_a_process
from lineage_jax.pods.topologies import Topology
from lineage_jax.sharding import MeshConfig

FLAGS = (
    "--xla_jf_dump_to={folder}",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=final",
)
"""What makes libtpu write the listing of each kernel, and what of each unit a bundle uses."""

BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*([A-Z]{2})?\s*:\s*(>*)")
"""A line on which a bundle begins: LB where a loop does, and > for each loop it is in."""

SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a kernel, or all of it.

    Attributes:
      bundles: of one trip, without those of the loops inside.
      inner: the loops inside, in order.
    """

    bundles: int
    inner: tuple["Loop", ...] = ()

    def cycles(self, trips: Iterator[int | float]) -> int | float:
        """What one trip takes; `trips` has those of each loop inside, as they begin."""
        return self.bundles + sum(next(trips) * loop.cycles(trips) for loop in self.inner)

    def __len__(self) -> int:
        """Loops inside, and inside these."""
        return sum(1 + len(loop) for loop in self.inner)


@dataclasses.dataclass(frozen=True)
class Listing:
    """A kernel as it was compiled.

    Attributes:
      whole: its bundles.
      spills: instructions that move what found no register.
    """

    whole: Loop
    spills: int

    def cycles(self, trips: Sequence[int | float]) -> int | float:
        """What the kernel takes, where each loop has so many trips, in the order they begin.

        Both sides of a condition count, wherever one is taken; a loop that only one side has is
        told apart by its trips.

        Raises:
          ValueError: if the kernel has another number of loops.
        """
        if len(trips) != len(self.whole):
            raise ValueError(f"wanted trips of {len(self.whole)} loops, got {len(trips)}")
        return self.whole.cycles(iter(trips))


def listings(
    function: Callable[..., Any], arguments: Any, topology: Topology, names: Sequence[str]
) -> Mapping[str, Listing]:
    """Compiles `function(*arguments)` for one chip, and gives its kernels of those names.

    Args:
      function: a function of a module, or a partial one of it: it is sent to another process.
      arguments: shapes and types.
      topology: of one chip.
      names: as `pallas_call` has them.

    Raises:
      ImportError: if libtpu is not installed.
      RuntimeError: if the compiler fails, or finds no such kernel.
    """
    with tempfile.TemporaryDirectory(prefix="lineage-bundles-") as folder:
        flags = tuple(flag.format(folder=folder) for flag in FLAGS)
        work = functools.partial(listings_here, function, arguments, topology, names, folder)
        return in_a_process((*topology.chip.flags, *flags), work)


def listings_here(
    function: Callable[..., Any],
    arguments: Any,
    topology: Topology,
    names: Sequence[str],
    folder: str,
) -> Mapping[str, Listing]:
    """`listings` in this process, whose libtpu must write into the folder."""
    mesh = topology.mesh(MeshConfig())
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for kernels that ask for the chip
        lowered = jax.jit(function).lower(*arguments)
    lowered.compile()
    return {name: listing(pathlib.Path(folder), name) for name in names}


def listing(folder: pathlib.Path, name: str) -> Listing:
    """The kernel of that name among what libtpu wrote.

    Raises:
      RuntimeError: if there is none.
    """
    texts = []
    for suffix in ("final_bundles.txt", "final_hlo-static-per-bundle-utilization.txt"):
        wanted = re.compile(rf"\d+-{re.escape(name)}(\.\d+)?-\d+-{re.escape(suffix)}")
        found = [path for path in folder.iterdir() if wanted.fullmatch(path.name)]
        if not found:
            raise RuntimeError(f"the compiler listed no kernel called {name!r}")
        texts.append(max(found).read_text())
    return Listing(loops(texts[0]), spills(texts[1]))


def loops(text: str) -> Loop:
    """The loops of a listing."""
    found = [match for match in map(BUNDLE.match, text.splitlines()) if match]
    begins, depths = [match[1] == "LB" for match in found], [len(match[2]) for match in found]
    for row in reversed(range(len(found) - 1)):
        depths[row] = depths[row] or depths[row + 1]  # of an empty bundle nothing is said

    def loop(start: int, depth: int) -> tuple[Loop, int]:
        """The loop that begins at a row, and the row after it."""
        bundles, inner, row = 1, [], start + 1
        while row < len(found) and depths[row] >= depth:
            if begins[row] and depths[row] == depth:
                break  # the next one
            if begins[row]:
                one, row = loop(row, depths[row])
                inner.append(one)
            else:
                bundles, row = bundles + 1, row + 1
        return Loop(bundles, tuple(inner)), row

    depths[: begins.index(True)] = [0] * begins.index(True)
    return loop(0, 0)[0]


def spills(text: str) -> int:
    """Instructions of the units that move what found no register, of all bundles."""
    head, table = text.split("UTILIZATION", 1)
    units = next(line for line in head.splitlines() if SPILLS[0] in line).split(", ")
    columns = [units.index(name) for name in SPILLS]
    rows = (line.split() for line in table.splitlines() if re.fullmatch(r"[\d ]+", line.strip()))
    return sum(int(row[column]) for row in rows for column in columns)
