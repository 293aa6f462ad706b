"""Claims: the sentence that each paper is known for, measured.

A milestone's `claim(study)` names the arms that are compared and what must come out, and the study
runs them: every arm for as many updates, on the same pairs, over the same seeds. The criterion
stands in the code before the run; a claim that fails is published as failed.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lineage_jax.train.metrics import environment, write_json

RESULTS = pathlib.Path(__file__).parent / "results" / "claims"
TUNING_SEED = 0  # learning rates are chosen on it; it is not counted


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
      milestone: its name in the lineage.
      statement: the paper's, in our words.
      where: it stands in the paper.
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
        lines = [f"{self.milestone}: {self.statement} ({self.where})", f"wanted: {self.criterion}"]
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


class Arm(Protocol):
    """One of what is compared."""

    @property
    def name(self) -> str: ...
    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates; plain JSON types."""
        ...

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed` and measures; "loss" is what learning rates are chosen by."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """How a claim is run, and where its numbers are kept.

    Each run of an arm is written down when it ends, so that a study that was killed goes on.
    """

    folder: pathlib.Path
    quick: bool = False
    num_seeds: int = 5
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    """The grid, the same for each arm."""
    say: Callable[[str], None] = print

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that are counted."""
        return tuple(range(1, 1 + (2 if self.quick else self.num_seeds)))

    @property
    def updates(self) -> int:
        return 4 if self.quick else 400

    def claim(
        self,
        milestone: str,
        arms: Sequence[Arm],
        findings: Callable[..., Sequence[Finding]],
        **told: str,
    ) -> Claim:
        """Runs the arms and draws the findings.

        Args:
          milestone: its name in the lineage.
          arms: what is compared.
          findings: from the arms' numbers, {name: one for each seed}, in the arms' order.
          **told: statement, where, criterion and setting of the `Claim`.
        """
        ran = [self.measure(milestone, arm) for arm in arms]
        measured = [
            {name: np.array([one[name] for one in arm["seeds"]]) for name in arm["seeds"][0]}
            for arm in ran
        ]
        made = Claim(
            milestone=milestone,
            findings=tuple(findings(*measured)),
            arms={arm.name: found for arm, found in zip(arms, ran, strict=True)},
            form="quick" if self.quick else "full",
            seeds=self.seeds,
            updates=self.updates,
            seconds=round(sum(found["seconds"] for found in ran), 1),
            date=time.strftime("%Y-%m-%d", time.gmtime()),
            environment={**environment(), "cores": os.cpu_count()},
            **told,
        )
        write_json(self.folder / f"{milestone}.json", made.to_json())
        return made

    def measure(self, milestone: str, arm: Arm) -> dict[str, Any]:
        """Chooses the arm's learning rate, then runs it from each seed."""
        grid, tuned, seconds = self.learning_rates, {}, 0.0
        for rate in () if self.quick else grid:
            told = self.run(milestone, arm, TUNING_SEED, rate)
            tuned[rate], seconds = told["measured"]["loss"], seconds + told["seconds"]
        best = min(tuned, key=lambda rate: tuned[rate]) if tuned else grid[0]
        ran = [self.run(milestone, arm, seed, best) for seed in self.seeds]
        return {
            "learning_rate": best,
            "loss_by_learning_rate": {str(rate): loss for rate, loss in tuned.items()},
            "setting": arm.setting(),
            "seeds": [one["measured"] for one in ran],
            "seconds": seconds + sum(one["seconds"] for one in ran),
        }

    def run(self, milestone: str, arm: Arm, seed: int, learning_rate: float) -> dict[str, Any]:
        """One run of an arm; read back if it was done before, for this claim or another."""
        what = {
            "seed": seed,
            "learning_rate": learning_rate,
            "updates": self.updates,
            "setting": arm.setting(),
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        path = self.folder / "runs" / f"{digest[:16]}.json"
        if path.exists():
            return json.loads(path.read_text())
        began = time.perf_counter()
        measured = arm.run(seed=seed, learning_rate=learning_rate, updates=self.updates)
        told = {"what": what, "measured": measured, "seconds": time.perf_counter() - began}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, told)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
        self.say(
            f"{milestone}  {arm.name}  seed {seed}  rate {learning_rate:g}  {numbers}  "
            f"{told['seconds']:.0f} s"
        )
        return told


def read_claims(folder: pathlib.Path = RESULTS) -> list[Claim]:
    """The claims in a folder, in the order of the lineage."""
    from lineage_jax.lineage import LINEAGE

    paths = [folder / f"{one.name}.json" for one in LINEAGE]
    return [Claim.from_json(json.loads(path.read_text())) for path in paths if path.exists()]


def markdown_table(claims: Sequence[Claim]) -> str:
    """The claims as the table that stands in the README."""
    from lineage_jax.lineage import find

    lines = [
        "| paper | criterion, set before the run | measured [95 % interval] | verdict | seconds |",
        "|---|---|---|---|---|",
    ]
    for one in claims:
        mark = {True: "yes", False: "**no**"}
        measured = "<br>".join(
            f"{finding.name}: {shown(finding)}, {mark[finding.passed]}" for finding in one.findings
        )
        paper = f"{find(one.milestone).paper}, {one.where}: {one.statement}"
        verdict = "reproduced" if one.passed else "**not reproduced**"
        if one.form == "quick":
            verdict = "quick form"
        lines.append(f"| {paper} | {one.criterion} | {measured} | {verdict} | {one.seconds:.0f} |")
    return "\n".join(lines)
