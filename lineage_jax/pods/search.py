"""Tries meshes, what the backward pass recomputes, and batch sizes, and ranks what fits."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from lineage_jax.pods.aot import DoesNotFitError, Request
from lineage_jax.pods.plan import Plan, make_plan
from lineage_jax.pods.topologies import Topology
from lineage_jax.sharding import RULES, MeshConfig

REMATS = ("none", "dots", "full")
"""From the fastest to the smallest (`lineage_jax.nn.stack`)."""

TENSOR = (1, 2, 4, 8)
"""Ways to split heads and feed-forward; more than 8 would leave a host of most slices."""

ROWS = (1, 2, 4, 8)
"""Rows of a batch for each of the shares it is split in."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train an experiment.

    Attributes:
      experiment: the experiment, changed.
      mesh: its mesh.
      remat: what its backward pass recomputes.
      rows: of a batch, all devices together.
    """

    experiment: Any
    mesh: MeshConfig
    remat: str
    rows: int

    def __str__(self) -> str:
        axes = " x ".join(f"{a} {n}" for a, n in dataclasses.asdict(self.mesh).items() if n != 1)
        return f"{axes or 'one device'}, remat {self.remat}, {self.rows} rows"


@dataclasses.dataclass(frozen=True)
class Tried:
    """What became of a candidate: a plan, or why there is none."""

    candidate: Candidate
    plan: Plan | None
    why: str = ""

    @property
    def speed(self) -> float:
        """Tokens per second per chip; 0 of what does not fit."""
        return self.plan.tokens_per_second_per_chip if self.plan and self.plan.fits else 0.0


def meshes(num_devices: int) -> Iterator[MeshConfig]:
    """Parameters split over all devices, with and without tensor parallelism."""
    for tensor in TENSOR:
        if num_devices % tensor == 0:
            yield MeshConfig(data=1, fsdp=num_devices // tensor, tensor=tensor)


def families(experiment: Any, topology: Topology) -> Iterator[list[Candidate]]:
    """Candidates that differ in their batch alone, in lists from the smallest."""
    for mesh in meshes(topology.num_devices):
        shares = math.prod(getattr(mesh, axis) for axis in RULES["batch"])
        for remat in REMATS:
            model = dataclasses.replace(experiment.model, remat=remat)
            family = []
            for rows in ROWS:
                data = dataclasses.replace(experiment.data, batch_size=rows * shares)
                changed = dataclasses.replace(experiment, model=model, data=data, mesh=mesh)
                family.append(Candidate(changed, mesh, remat, rows * shares))
            yield family


def search(
    experiment: Any, topology: Topology, tokens: float, say: Callable[[str], None]
) -> list[Tried]:
    """Compiles one candidate after the other; the fastest that fits comes first.

    Args:
      experiment: a config with `model.remat`, `data.batch_size`, `mesh` and `program()`.
      topology: the slice.
      tokens: to train on.
      say: receives a line for each candidate.
    """
    tried = []
    for family in families(experiment, topology):
        for candidate in family:
            one = attempt(candidate, topology, tokens)
            tried.append(one)
            say(line(one))
            if not one.speed:
                break
    return sorted(tried, key=lambda one: -one.speed)


def attempt(candidate: Candidate, topology: Topology, tokens: float) -> Tried:
    """Plans one candidate."""
    request = Request(candidate.experiment.program, topology, candidate.mesh)
    try:
        return Tried(candidate, make_plan(request, tokens))
    except DoesNotFitError as error:
        return Tried(candidate, None, str(error))
    except ValueError as error:  # heads that the mesh does not divide, for one
        return Tried(candidate, None, str(error))


def line(tried: Tried) -> str:
    """One candidate as a line of a table."""
    plan = tried.plan
    if plan is None:
        return f"{tried.candidate!s:<44} {tried.why}"
    fits = "" if plan.fits else "  DOES NOT FIT"
    return (
        f"{tried.candidate!s:<44}{plan.hbm_total / 2**30:8.2f} GiB{plan.seconds:9.3f} s"
        f"{plan.tokens_per_second_per_chip:10,.0f} tokens/s/chip  MFU {plan.mfu:5.1%}{fits}"
    )
