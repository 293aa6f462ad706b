"""Which slice to train on: the one named, the smallest that holds the step, or that is in time."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lineage_jax.pods import SLICES, Chip, Plan, Topology, search

ASSUMED_MFU = 0.4
"""To choose what to compile first: 0.38 to 0.43 at 405B (Llama Team 2024, arXiv 2407.21783, table
4)."""

STATE_BYTES = 12
"""Of a parameter: it and AdamW's two moments, in float32."""


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
    shapes = SLICES[chip.name]
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
    experiment: Any, choices: Sequence[Topology], tokens: float, say: Callable[[str], None]
) -> Chosen:
    """The first of some slices that holds the step, with its fastest mesh.

    Args:
      experiment: with the batch that it trains on.
      choices: the slices.
      tokens: to train on.
      say: receives a line for each step that was tried.

    Raises:
      ValueError: if none holds it.
    """
    for topology in choices:
        if chosen := fastest(experiment, topology, tokens, say):
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
        chosen = fastest(experiment, topology, tokens, say)
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
    experiment: Any, topology: Topology, tokens: float, say: Callable[[str], None]
) -> Chosen | None:
    """The fastest way to train on a slice with the experiment's batch; None if none fits."""
    found = search.search(experiment, topology, tokens, say, keep_batch=True)
    if not found or found[0].sketched:
        return None
    plan = found[0].plan
    assert plan is not None
    return Chosen(found[0].candidate.experiment, topology, plan)
