"""A claim: what a paper says, what counts as reproduced, what came out, and with which interval."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One number that the criterion asks for.

    Attributes:
      name: what was measured, and in which unit.
      measured: over all seeds.
      interval: 95 %, by paired bootstrap over seeds; None for a count of seeds.
      wanted: the least and the most that `measured` may be; None where there is no bound.
      interval_wanted: the same for the interval, all of it.
    """

    name: str
    measured: float
    interval: tuple[float, float] | None
    wanted: tuple[float | None, float | None]
    interval_wanted: tuple[float | None, float | None]

    @property
    def passed(self) -> bool:
        """Whether the number and its interval are as wanted."""
        inside = within((self.measured, self.measured), self.wanted)
        return inside and (self.interval is None or within(self.interval, self.interval_wanted))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says, and what came out here.

    Attributes:
      name: of its file in `experiments/claims`.
      milestone: its name in the lineage.
      statement: the paper's, in our words.
      where: the paper, and where it stands there.
      criterion: what counts as reproduced, as it was fixed before the run.
      setting: what the arms have in common, and how numbers were counted.
      findings: what the criterion asks for.
      arms: for each arm its learning rate, and every number of every seed.
      form: "full", or "quick", which shows that all runs and says nothing of the paper.
      seeds: that were counted.
      updates: of each arm.
      seconds: of training and measuring, all arms and rates together.
      date: on which the findings were drawn, as 2026-11-22.
      environment: machine and versions.
    """

    name: str
    milestone: str
    statement: str
    where: str
    criterion: str
    setting: str
    findings: tuple[Finding, ...]
    arms: Mapping[str, Any]
    form: str
    seeds: tuple[int, ...]
    updates: int
    seconds: float
    date: str
    environment: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every finding is as wanted."""
        return all(finding.passed for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types, the verdicts with it."""
        told = json.loads(json.dumps(dataclasses.asdict(self)))
        for finding, written in zip(self.findings, told["findings"], strict=True):
            written["passed"] = finding.passed
        return {**told, "passed": self.passed}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Claim":
        """The claim that `to_json` wrote; verdicts are drawn again from the numbers."""
        found = []
        for one in told["findings"]:
            pairs = {key: one[key] and tuple(one[key]) for key in PAIRS}
            found.append(Finding(name=one["name"], measured=one["measured"], **pairs))
        others = {field.name: told[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**others, "findings": tuple(found), "seeds": tuple(told["seeds"])})

    def lines(self) -> list[str]:
        """For a terminal."""
        verdict = "reproduced" if self.passed else "NOT reproduced"
        if self.form == "quick":
            verdict = "quick form: it ran; its numbers say nothing of the paper"
        lines = [f"{self.name}: {self.statement} ({self.where})", f"wanted: {self.criterion}"]
        for one in self.findings:
            lines.append(f"  {'yes' if one.passed else 'NO ':3}  {one.name}: {shown(one)}")
        return [*lines, f"{verdict}; {len(self.seeds)} seeds, {self.seconds:.0f} s"]


PAIRS = ("interval", "wanted", "interval_wanted")  # fields of a Finding that JSON has as lists


def within(values: tuple[float, float], bounds: tuple[float | None, float | None]) -> bool:
    """Whether values, the lesser first, are inside of bounds; None is no bound."""
    (low, high), (least, most) = values, bounds
    return (least is None or low >= least) and (most is None or high <= most)


def shown(finding: Finding) -> str:
    """The number and its interval, to read."""
    if finding.interval is None:
        return f"{finding.measured:.3g}"
    low, high = finding.interval
    return f"{finding.measured:.3g} [{low:.3g}, {high:.3g}]"


def find(
    name: str,
    statistic: Callable[..., Any],
    *arms: Sequence[float],
    wanted: tuple[float | None, float | None],
    interval_wanted: tuple[float | None, float | None] | None = None,
) -> Finding:
    """A statistic of the arms, with its interval.

    Args:
      name: of the finding.
      statistic: of arrays [..., seeds], one for each arm, over the last axis.
      *arms: a number for each seed; the same seeds in the same order, so that they are paired.
      wanted: bounds of the statistic.
      interval_wanted: bounds of the interval; those of the statistic if not given.
    """
    values = [np.asarray(arm, float) for arm in arms]
    return Finding(
        name=name,
        measured=float(statistic(*values)),
        interval=bootstrap(statistic, *values),
        wanted=wanted,
        interval_wanted=wanted if interval_wanted is None else interval_wanted,
    )


def count(name: str, holds: Sequence[bool] | np.ndarray, *, at_least: int) -> Finding:
    """In how many seeds something holds."""
    wanted = (float(at_least), None)
    return Finding(
        name=name,
        measured=float(np.sum(holds)),
        interval=None,
        wanted=wanted,
        interval_wanted=wanted,
    )


def bootstrap(statistic: Callable[..., Any], *arms: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic over seeds (Efron 1979), paired.

    Seeds are drawn with replacement, the same for all arms. They are few, and so every draw that
    there is, n^n, is made once: the interval has no randomness of its own. Of so few seeds it is
    somewhat too short (Efron and Tibshirani 1993, chapter 14).
    """
    seeds = len(arms[0])
    assert seeds <= 6, "46,656 draws; of more seeds, take a sample of them"
    draws = np.array(list(itertools.product(range(seeds), repeat=seeds)))
    low, high = np.percentile(statistic(*(arm[draws] for arm in arms)), [2.5, 97.5])
    return float(low), float(high)


def ratio_of_means(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean of `a` over that of `b`; none against none is 1."""
    a, b = a.mean(-1), b.mean(-1)
    both_none = (a == 0) & (b == 0)
    return np.where(both_none, 1.0, a / np.where(both_none, 1.0, b))


def mean_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean of `a` less that of `b`."""
    return (a - b).mean(-1)
