"""How many instructions a TPU takes for a Pallas kernel, from its compiler's own listing.

A bundle holds the instructions of one cycle, and the compiler fixes them all: bundles times how
often they are taken is the time of a kernel, but for what it waits for memory. No device is needed,
and two compilations of one kernel by one libtpu agree.
"""

import dataclasses
import functools
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lineage_jax.pods.aot import in_a_process
from lineage_jax.pods.regions import Region, regions
from lineage_jax.pods.topologies import Topology
from lineage_jax.sharding import MeshConfig, make_mesh

FLAGS = (
    "--xla_jf_dump_to={folder}",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=final",
)
"""What makes libtpu write the listing of each kernel, and what of each unit a bundle uses."""

STAGES = 2
"""Steps more than a grid has that its loop takes: copies begin before the first one computes, and
end after the last one."""

SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")


@dataclasses.dataclass(frozen=True)
class Listing:
    """A kernel as it was compiled.

    Attributes:
      whole: its bundles.
      spills: instructions that move what found no register.
    """

    whole: Region
    spills: int

    @property
    def grid(self) -> Region:
        """The loop over the steps of the grid."""
        region = self.whole
        while not region.loop:
            region = max(region.inner, key=lambda inner: inner.size)
        return region

    def parts(self) -> list[int]:
        """Bundles of a step of the grid around what is computed, of what is, and of its parts.

        A part is a branch, or a loop whose rounds are not constant; those of a part inside do not
        count in it. Around are the copies of what is read and written, taken as if each step had
        them all.
        """
        grid = self.grid
        body = max((r for r in grid.inner if not r.loop), key=lambda region: region.size)
        around = grid.size - body.size
        return [around, *body.parts()]

    def cycles(self, counts: Sequence[int | float]) -> int | float:
        """What the kernel takes, where each of its parts is taken so often.

        Args:
          counts: of the grid's steps; of the parts in what a step computes, in the order they
            begin, over all steps.

        Raises:
          ValueError: if the kernel has another number of parts, or of steps.
        """
        around, body, *parts = self.parts()
        if len(counts) != 1 + len(parts):
            raise ValueError(
                f"wanted counts of {1 + len(parts)} parts, of {[around, body, *parts]} bundles "
                f"(steps are the first two), got {len(counts)}"
            )
        steps, *often = counts
        if self.grid.rounds not in (None, steps + STAGES):
            raise ValueError(
                f"wanted a grid of {self.grid.rounds - STAGES} steps, got a count of {steps}"
            )
        once = self.whole.size - self.grid.size
        inside = sum(n * part for n, part in zip(often, parts, strict=True))
        return once + (steps + STAGES) * around + steps * body + inside


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
    return dumped(functools.partial(listings_here, function, arguments, topology, names), topology)


def kernels(
    function: Callable[..., Any], arguments: Any, topology: Topology
) -> Mapping[str, Listing]:
    """All kernels of `function(*arguments)`, each compiled alone, and not what is around them.

    So it takes seconds where the whole would take minutes. Of kernels of one name the first counts.

    Args:
      function, arguments, topology: of `listings`.

    Raises:
      ImportError: if libtpu is not installed.
      RuntimeError: if the compiler fails.
    """
    return dumped(functools.partial(kernels_here, function, arguments, topology), topology)


def dumped(work: Callable[..., Any], topology: Topology) -> Any:
    """The result of some work on a folder, in a process whose libtpu writes listings there."""
    with tempfile.TemporaryDirectory(prefix="lineage-bundles-") as folder:
        flags = tuple(flag.format(folder=folder) for flag in FLAGS)
        work = functools.partial(work, folder=folder)
        return in_a_process((*topology.chip.flags, *flags), work)


def listings_here(
    function: Callable[..., Any],
    arguments: Any,
    topology: Topology,
    names: Sequence[str],
    *,
    folder: str,
) -> Mapping[str, Listing]:
    """`listings` in this process, whose libtpu must write into the folder."""
    on_chip(function, arguments, topology, "lower").compile()
    return {name: listing(pathlib.Path(folder), name) for name in names}


def kernels_here(
    function: Callable[..., Any], arguments: Any, topology: Topology, *, folder: str
) -> Mapping[str, Listing]:
    """`kernels` in this process, whose libtpu must write into the folder."""
    found = dict[str, Listing]()
    for call in calls(on_chip(function, arguments, topology, "trace").jaxpr.jaxpr):
        name = call.params["name"]
        if name not in found:
            given = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in call.invars]
            on_chip(functools.partial(alone, call), given, topology, "lower").compile()
            found[name] = listing(pathlib.Path(folder), name)
    return found


def alone(call: Any, *given: Any) -> Any:
    """One equation of a program."""
    with jax.named_scope(call.params["name"]):  # or the listing has another name
        return call.primitive.bind(*given, **call.params)


def on_chip(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    topology: Topology,
    stage: str,
    donate: Sequence[int] = (),
) -> Any:
    """`function(*arguments)` to a stage of `jax.jit`, "trace" or "lower", for one chip.

    Those arguments that are donated may be written over.
    """
    mesh = device_mesh(topology)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for kernels that ask for the chip
        return getattr(jax.jit(function, donate_argnums=donate), stage)(*arguments)


def device_mesh(topology: Topology) -> Mesh:
    """One device: a TPU7x has two."""
    return make_mesh(MeshConfig(), topology.devices()[:1])


def calls(jaxpr: Any) -> Iterator[Any]:
    """The calls of kernels in a program, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from calls(inner)


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
    return Listing(regions(texts[0]), spills(texts[1]))


def spills(text: str) -> int:
    """Instructions of the units that move what found no register, of all bundles."""
    head, table = text.split("UTILIZATION", 1)
    units = next(line for line in head.splitlines() if SPILLS[0] in line).split(", ")
    columns = [units.index(name) for name in SPILLS]
    rows = (line.split() for line in table.splitlines() if re.fullmatch(r"[\d ]+", line.strip()))
    return sum(int(row[column]) for row in rows for column in columns)
