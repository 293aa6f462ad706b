"""Which slice to train on: the one named, the smallest that holds the step, or that is in time."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from lineage_jax.pods import Chip, Plan, Request, Topology, make_plan, search

ASSUMED_MFU = 0.4
"""To choose what to compile first: 0.38 to 0.43 at 405B (Llama Team 2024, arXiv 2407.21783, table
4)."""

STATE_BYTES = 12
"""Of a parameter: it and AdamW's two moments, in float32."""

LARGER = {
    "v4": ("8x16x16", "16x16x16"),
    "v5p": ("8x16x16", "16x16x16", "16x16x24"),
}
"""Slices beyond `search.SLICES` (https://docs.cloud.google.com/tpu/docs/v4 and v5p, tables of
configurations)."""

ACTIVATIONS = "activations and temporaries"
"""The part of a plan's memory that grows with the rows."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An experiment with its mesh, batch and micro-batches, and the plan of that step."""

    experiment: Any
    topology: Topology
    plan: Plan


def slices(chip: Chip, params: float) -> list[Topology]:
    """Slices of a chip whose memory can hold the state of a model, the smallest first.

    Raises:
      ValueError: if the largest cannot.
    """
    shapes = (*search.SLICES[chip.torus_dims], *LARGER.get(chip.name, ()))
    all_of_them = [Topology.parse(f"{chip.name}:{shape}") for shape in shapes]
    wanted = STATE_BYTES * params
    found = [one for one in all_of_them if one.num_chips * chip.hbm_bytes > wanted]
    if not found:
        raise ValueError(
            f"{params:.3g} parameters and their moments are {wanted / 1e12:.3g} TB, more than "
            f"{shapes[-1]} of {chip.name} hold: take a larger chip, or fewer --flops"
        )
    return found


def smallest(
    experiment: Any,
    choices: Sequence[Topology],
    tokens: float,
    say: Callable[[str], None],
    thorough: bool = False,
) -> Chosen:
    """The first of some slices that holds the step, with its fastest mesh.

    Args:
      experiment: with the batch that it trains on.
      choices: the slices.
      tokens: to train on.
      say: receives a line for each step that was compiled.
      thorough: see `fastest`.

    Raises:
      ValueError: if none holds it.
    """
    for topology in choices:
        if chosen := fastest(experiment, topology, tokens, say, thorough):
            return chosen
    raise ValueError(
        f"no mesh that was tried fits {choices[-1].name}: take a larger slice, or other "
        "--batch-tokens"
    )


def in_time(
    experiment: Any,
    choices: Sequence[Topology],
    tokens: float,
    days: float,
    say: Callable[[str], None],
    thorough: bool = False,
) -> Chosen:
    """The smallest of some slices that is done in so many days.

    The first to be compiled is the one that `ASSUMED_MFU` suggests; what it turns out to reach
    suggests the next, until that is one that has been compiled.

    Args:
      days: to be done in; the others as in `smallest`.

    Raises:
      ValueError: if none is.
    """
    per_token, mfu = experiment.program().flops_per_token, ASSUMED_MFU
    remaining, planned = list(choices), dict[Topology, Chosen]()

    def promising(topology: Topology) -> bool:
        peak = topology.num_chips * topology.chip.peak_flops
        return topology in planned or per_token * tokens / (peak * mfu) <= days * 86400

    while remaining:
        # If not even the largest is expected to do, it is still the one to be sure of.
        topology = next(filter(promising, remaining), remaining[-1])
        if topology in planned:
            return planned[topology]
        chosen = fastest(experiment, topology, tokens, say, thorough)
        if chosen is not None:
            mfu = chosen.plan.mfu
            say(f"{topology.name}: {chosen.plan.days:,.1f} days, {days:g} are wanted")
        if chosen is not None and chosen.plan.days <= days:
            planned[topology] = chosen
        else:  # nor will a smaller one do
            remaining = remaining[remaining.index(topology) + 1 :]
    raise ValueError(
        f"no slice up to {choices[-1].name} was found to be done in {days:g} days: take more "
        "--days, or another --chip"
    )


def fastest(
    experiment: Any,
    topology: Topology,
    tokens: float,
    say: Callable[[str], None],
    thorough: bool = False,
) -> Chosen | None:
    """The fastest mesh that holds the step on a slice; None if none does.

    Whole blocks are recomputed, and each mesh takes as many rows at once as fit: the more there
    are, the less a step waits for weights.

    Args:
      thorough: compare all that `search` knows: what is recomputed, and rows, too.
    """
    tried: list[search.Tried] = []

    def fits(candidate: search.Candidate) -> bool:
        tried.append(attempt(candidate, experiment.data.batch_size, tokens))
        say(tried[-1].line())
        return tried[-1].fits

    if thorough:
        for remat in search.REMATS:
            for family in search.families(experiment, topology, remat, search.ROWS):
                all(map(fits, family))  # where some rows do not fit, more do not either
    else:
        times = 1
        for (candidate,) in search.families(experiment, topology, search.REMATS[-1], (1,)):
            while not fits(more_rows(candidate, times)) and times > 1:
                times //= 2  # than the mesh before took
            if (plan := tried[-1].plan) is None or not plan.fits:
                continue
            room = 1 + (plan.hbm_limit - plan.hbm_total) / max(1, plan.hbm[ACTIVATIONS])
            most = experiment.data.batch_size // candidate.rows
            more = 2 ** round(math.log2(min(times * room, most)))
            while more > times and not fits(more_rows(candidate, more)):
                more //= 2
            times = more
    best = max(tried, key=lambda one: one.speed)
    if best.plan is None or not best.fits:
        return None
    return Chosen(best.candidate.experiment, topology, best.plan)


def more_rows(candidate: search.Candidate, times: int) -> search.Candidate:
    """The candidate with so many times the rows at once."""
    return dataclasses.replace(candidate, rows=times * candidate.rows)


def attempt(candidate: search.Candidate, batch_size: int, tokens: float) -> search.Tried:
    """Plans the step of a whole batch, the candidate's rows at a time."""
    if batch_size % candidate.rows:
        why = f"a batch of {batch_size} rows is no multiple of {candidate.rows}"
        return search.Tried(candidate, None, why)
    tried = candidate.experiment
    accumulate = batch_size // candidate.rows
    whole = dataclasses.replace(
        tried,
        data=dataclasses.replace(tried.data, batch_size=batch_size),
        train=dataclasses.replace(tried.train, accumulate=accumulate),
    )
    candidate = dataclasses.replace(candidate, experiment=whole)
    request = Request(whole.program, candidate.topology, whole.mesh, accumulate)
    try:
        return search.Tried(candidate, make_plan(request, tokens))
    except ValueError as error:  # it does not fit, or the mesh does not divide the heads
        return search.Tried(candidate, None, str(error).partition(";")[0])
