"""Tries meshes, what the backward pass recomputes, and batch sizes, and ranks what fits.

All are sketched, in seconds each (`plan.make_sketch`); the most promising are compiled.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lineage_jax.pods.aot import Request
from lineage_jax.pods.chips import GIB
from lineage_jax.pods.plan import ACTIVATIONS, TEMPORARIES, Plan, make_plan, make_sketch
from lineage_jax.pods.topologies import Topology
from lineage_jax.sharding import RULES, MeshConfig

REMATS = ("full", "attention", "inner", "dots", "none")
"""From the smallest to the fastest (`lineage_jax.nn.stack`)."""

TENSOR = (1, 2, 4, 8)
"""Ways to split heads and feed-forward: no more than the chips of a host."""

DATA = (1, 2, 4)
"""Replicas of all shares: weights then travel along fewer dimensions of the torus."""

ROWS = 8
"""For each device, at most, of a batch that may be any."""

BEST = 3
"""Meshes that are tried with less that is recomputed."""

SURE = 3
"""Candidates that are compiled."""

WORKERS = 4
"""Sketches at a time, each of 2 GB, where there are as many cores."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train an experiment.

    Attributes:
      experiment: the experiment, changed.
      topology: the slice.
      rows: of a batch that are computed at once, all devices together.
    """

    experiment: Any
    topology: Topology
    rows: int

    def __str__(self) -> str:
        mesh = dataclasses.asdict(self.experiment.mesh)
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size != 1)
        remat = self.experiment.model.remat
        return f"{self.topology.name}  {axes or 'one device'}  remat {remat}  {self.rows} rows"


@dataclasses.dataclass(frozen=True)
class Tried:
    """What became of a candidate: a plan, or why there is none."""

    candidate: Candidate
    plan: Plan | None
    why: str = ""
    sketched: bool = False
    """And not compiled."""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    @property
    def speed(self) -> float:
        """Tokens per second per chip; 0 of what does not fit."""
        return self.plan.tokens_per_second_per_chip if self.plan and self.plan.fits else 0.0

    def line(self) -> str:
        """As a line of a table."""
        how = "sketch  " if self.sketched else "compiled"
        if self.plan is None:
            return f"{how} {self.candidate!s:<64} {self.why}"
        verdict = "" if self.fits else "  DOES NOT FIT"
        return (
            f"{how} {self.candidate!s:<64}{self.plan.hbm_total / GIB:8.2f} GiB"
            f"{self.plan.seconds:9.3f} s{self.plan.tokens_per_second_per_chip:10,.0f} tokens/s/chip"
            f"  MFU {self.plan.mfu:5.1%}{verdict}"
        )


def smallest(
    experiment: Any,
    slices: Sequence[Topology],
    tokens: float,
    say: Callable[[str], None],
    keep_batch: bool = False,
) -> list[Tried]:
    """What `search` finds on the first of some slices where anything fits; else nothing."""
    for topology in slices:
        found = search(experiment, topology, tokens, say, keep_batch)
        if found and not found[0].sketched:
            return found
    return []


def search(
    experiment: Any,
    topology: Topology,
    tokens: float,
    say: Callable[[str], None],
    keep_batch: bool = False,
) -> list[Tried]:
    """The fastest ways to train on a slice.

    First every mesh is sketched, with whole blocks recomputed; then the fastest of them with less
    that is recomputed; each with as many rows at once as fit. The fastest sketches are compiled.

    Args:
      experiment: a config with `model.remat`, `data.batch_size`, `train.accumulate`, `mesh` and
        `program()`.
      topology: the slice.
      tokens: to train on.
      say: receives a line for each candidate.
      keep_batch: whether a step takes the experiment's batch, in as many micro-batches as need be;
        else what is computed at once is the batch.

    Returns:
      What fits: first what was compiled, then what was sketched, the fastest of each first.
    """

    most = experiment.data.batch_size if keep_batch else ROWS * topology.num_devices

    def tried(candidate: Candidate, sketched: bool) -> Tried:
        found = attempt(candidate, tokens, sketched)
        say(found.line())
        return found

    def with_rows(mesh: MeshConfig, remat: str) -> list[Tried]:
        """With a row for each share, and with as many as fit."""

        def sketch(rows: int) -> Tried:
            return tried(change(experiment, topology, mesh, remat, rows, keep_batch), True)

        found = [sketch(shares(mesh))]
        for rows in more_rows(found[0], most):
            found.append(sketch(rows))
            if found[-1].fits:
                break
        return found

    def with_less_recomputed(mesh: MeshConfig) -> list[Tried]:
        found: list[Tried] = []
        for remat in REMATS[1:]:
            some = with_rows(mesh, remat)
            found += some
            if not some[0].fits:  # nor does what recomputes less
                break
        return found

    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        sketches = joined(pool.map(lambda mesh: with_rows(mesh, REMATS[0]), meshes(topology)))
        ranked = (one.candidate.experiment.mesh for one in fastest(sketches))
        best = list(dict.fromkeys(ranked))[:BEST]
        sketches += joined(pool.map(with_less_recomputed, best))
    promising, compiled = unlike_first(fastest(sketches)), list[Tried]()
    while promising and len(fastest(compiled)) < SURE:
        compiled.append(tried(promising.pop(0).candidate, False))
    return fastest(compiled) + fastest(promising)


def joined(lists: Iterable[list[Tried]]) -> list[Tried]:
    """One list."""
    return list(itertools.chain.from_iterable(lists))


def fastest(tried: Iterable[Tried]) -> list[Tried]:
    """Of what was tried, what fits, the fastest first."""
    return sorted((one for one in tried if one.fits), key=lambda one: -one.speed)


def unlike_first(ranked: Sequence[Tried]) -> list[Tried]:
    """The first with each kind of recomputation, then the others.

    Sketches of one kind err alike; of another kind, by more or less (`experiments/LOG.md`).
    """
    first: dict[str, Tried] = {}
    for one in ranked:
        first.setdefault(one.candidate.experiment.model.remat, one)
    return [*first.values(), *(one for one in ranked if one not in first.values())]


def more_rows(first: Tried, most: int) -> Iterator[int]:
    """Rows that may fit where the first does, the most first: its own times a power of two."""
    if first.plan is None or not first.fits:
        return
    grows = first.plan.hbm[ACTIVATIONS] + first.plan.hbm[TEMPORARIES]
    room = (first.plan.hbm_limit - first.plan.hbm_total) / max(1, grows)
    times = 2 ** math.ceil(math.log2(1 + room))
    while times > 1:
        if times * first.candidate.rows <= most:
            yield times * first.candidate.rows
        times //= 2


def meshes(topology: Topology) -> Iterator[MeshConfig]:
    """Meshes of a slice: some ways of tensor, some of data, and the rest of fsdp."""
    for tensor, replicas in itertools.product(TENSOR, DATA):
        if topology.num_devices % (tensor * replicas) == 0:
            fsdp = topology.num_devices // (tensor * replicas)
            yield MeshConfig(data=replicas, fsdp=fsdp, tensor=tensor)


def shares(mesh: MeshConfig) -> int:
    """In how many parts it splits the rows of a batch."""
    return math.prod(getattr(mesh, axis) for axis in RULES["batch"])


def change(
    experiment: Any, topology: Topology, mesh: MeshConfig, remat: str, rows: int, keep_batch: bool
) -> Candidate:
    """The experiment, changed so that a slice computes so many rows at once."""
    batch = experiment.data.batch_size if keep_batch else rows
    changed = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, remat=remat),
        data=dataclasses.replace(experiment.data, batch_size=batch),
        train=dataclasses.replace(experiment.train, accumulate=max(1, batch // rows)),
        mesh=mesh,
    )
    return Candidate(changed, topology, rows)


def attempt(candidate: Candidate, tokens: float, sketched: bool) -> Tried:
    """Plans one candidate, or says in a line why that cannot be."""
    experiment = candidate.experiment
    batch, accumulate = experiment.data.batch_size, experiment.train.accumulate
    if batch != candidate.rows * accumulate:
        why = f"a batch of {batch} rows is no multiple of {candidate.rows}"
        return Tried(candidate, None, why, sketched)
    request = Request(experiment.program, candidate.topology, experiment.mesh, accumulate)
    try:
        plan = (make_sketch if sketched else make_plan)(request, tokens)
    except (ValueError, RuntimeError) as error:  # too large, heads that a mesh does not divide, ...
        return Tried(candidate, None, str(error).partition(";")[0], sketched)
    return Tried(candidate, plan, sketched=sketched)
