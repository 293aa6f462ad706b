"""Tries meshes, what the backward pass recomputes, and batch sizes, and ranks what fits."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lineage_jax.pods.aot import DoesNotFitError, Request
from lineage_jax.pods.chips import GIB, Chip
from lineage_jax.pods.plan import Plan, make_plan
from lineage_jax.pods.topologies import Topology
from lineage_jax.sharding import RULES, MeshConfig

REMATS = ("none", "dots", "inner", "attention", "full")
"""From the fastest to the smallest (`lineage_jax.nn.stack`)."""

TENSOR = (1, 2, 4, 8)
"""Ways to split heads and feed-forward: no more than the chips of a host."""

DATA = (1, 2, 4)
"""Replicas of all shares: weights then travel along fewer dimensions of the torus."""

ROWS = (1, 2, 4, 8)
"""Rows of a batch for each of the shares that it is split in."""

BEST = 2
"""Meshes that are tried with all that can be recomputed."""

SLICES = {
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
"""Shapes that Google Cloud sells, by the dimensions of the torus, the smallest first
(https://docs.cloud.google.com/tpu/docs/v5e and v5p-training, tables of configurations)."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train an experiment.

    Attributes:
      experiment: the experiment, changed.
      topology: the slice.
      remat: what its backward pass recomputes.
      rows: of a batch, all devices together.
    """

    experiment: Any
    topology: Topology
    remat: str
    rows: int

    def __str__(self) -> str:
        mesh = dataclasses.asdict(self.experiment.mesh)
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size != 1)
        return f"{self.topology.name}  {axes or 'one device'}  remat {self.remat}  {self.rows} rows"


@dataclasses.dataclass(frozen=True)
class Tried:
    """What became of a candidate: a plan, or why there is none."""

    candidate: Candidate
    plan: Plan | None
    why: str = ""
    possible: bool = True
    """With more memory, if there is no plan."""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    @property
    def speed(self) -> float:
        """Tokens per second per chip; 0 of what does not fit."""
        return self.plan.tokens_per_second_per_chip if self.plan and self.plan.fits else 0.0

    def line(self) -> str:
        """As a line of a table."""
        if self.plan is None:
            return f"{self.candidate!s:<56} {self.why}"
        verdict = "" if self.fits else "  DOES NOT FIT"
        return (
            f"{self.candidate!s:<56}{self.plan.hbm_total / GIB:8.2f} GiB{self.plan.seconds:9.3f} s"
            f"{self.plan.tokens_per_second_per_chip:10,.0f} tokens/s/chip"
            f"  MFU {self.plan.mfu:5.1%}{verdict}"
        )


def search(
    experiment: Any, topology: Topology, tokens: float, say: Callable[[str], None]
) -> list[Tried]:
    """Compiles one candidate after the other; the fastest that fits comes first.

    First every mesh, with a row for each device, or as many as fit, and whole blocks recomputed;
    then the fastest of these with more rows, and with less that is recomputed.

    Args:
      experiment: a config with `model.remat`, `data.batch_size`, `mesh` and `program()`.
      topology: the slice.
      tokens: to train on.
      say: receives a line for each candidate.
    """
    tried: list[Tried] = []

    def fits(candidate: Candidate) -> bool:
        tried.append(attempt(candidate, tokens))
        say(tried[-1].line())
        return tried[-1].fits

    for mesh in meshes(topology, DATA):
        rows = topology.num_devices
        while not fits(candidate(experiment, topology, mesh, REMATS[-1], rows)):
            rows //= 2
            if not tried[-1].possible or rows < shares(mesh):
                break
    ranked = sorted((one for one in tried if one.fits), key=lambda one: -one.speed)
    for one in ranked[:BEST]:
        for remat in REMATS:
            rows = one.candidate.rows * (2 if remat == REMATS[-1] else 1)
            mesh = one.candidate.experiment.mesh
            while rows <= ROWS[-1] * topology.num_devices:
                if not fits(candidate(experiment, topology, mesh, remat, rows)):
                    break
                rows *= 2
    return sorted(tried, key=lambda one: -one.speed)


def smallest(experiment: Any, chip: Chip, tokens: float, say: Callable[[str], None]) -> list[Tried]:
    """Candidates for the smallest slice that holds the step with one row for each share.

    Returns:
      Those of the first slice where one fits, the fastest first; none if none does.
    """
    for shape in SLICES[chip.torus_dims]:
        topology = Topology.parse(f"{chip.name}:{shape}")
        tried = []
        for family in families(experiment, topology, REMATS[-1], (1,)):
            tried += run(family, tokens, say)
        if any(one.fits for one in tried):
            return sorted(tried, key=lambda one: -one.speed)
    return []


def families(
    experiment: Any, topology: Topology, remat: str, rows: Sequence[int]
) -> Iterator[list[Candidate]]:
    """For each mesh, the candidates that differ in their rows a share, the smallest first."""
    for mesh in meshes(topology):
        yield [candidate(experiment, topology, mesh, remat, each * shares(mesh)) for each in rows]


def meshes(topology: Topology, data: Sequence[int] = (1,)) -> Iterator[MeshConfig]:
    """Meshes of a slice: some ways of tensor, some of data, and the rest of fsdp."""
    for tensor, replicas in itertools.product(TENSOR, data):
        if topology.num_devices % (tensor * replicas) == 0:
            fsdp = topology.num_devices // (tensor * replicas)
            yield MeshConfig(data=replicas, fsdp=fsdp, tensor=tensor)


def shares(mesh: MeshConfig) -> int:
    """In how many parts it splits the rows of a batch."""
    return math.prod(getattr(mesh, axis) for axis in RULES["batch"])


def candidate(
    experiment: Any, topology: Topology, mesh: MeshConfig, remat: str, rows: int
) -> Candidate:
    """The experiment changed, with so many rows to a batch."""
    changed = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, remat=remat),
        data=dataclasses.replace(experiment.data, batch_size=rows),
        mesh=mesh,
    )
    return Candidate(changed, topology, remat, rows)


def run(family: Sequence[Candidate], tokens: float, say: Callable[[str], None]) -> list[Tried]:
    """Plans the candidates of a family, up to the first that does not fit."""
    tried: list[Tried] = []
    for candidate in family:
        tried.append(attempt(candidate, tokens))
        say(tried[-1].line())
        if not tried[-1].fits:
            break
    return tried


def attempt(candidate: Candidate, tokens: float) -> Tried:
    """Plans one candidate."""
    experiment = candidate.experiment
    request = Request(experiment.program, candidate.topology, experiment.mesh)
    try:
        return Tried(candidate, make_plan(request, tokens))
    except DoesNotFitError as error:
        return Tried(candidate, None, str(error).partition(";")[0])
    except ValueError as error:  # heads that the mesh does not divide, for one
        return Tried(candidate, None, str(error), possible=False)
