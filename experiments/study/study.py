"""How claims are measured: every arm for as many updates, on the same data, over the same seeds."""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from experiments.study.claim import Claim, Finding
from lineage_jax.train.metrics import environment, write_json

TUNING_SEED = 0  # learning rates are chosen on it; it is not counted


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
    num_updates: int = 400
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    """The grid, the same for each arm."""
    say: Callable[[str], None] = print

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that are counted."""
        return tuple(range(1, 1 + (2 if self.quick else self.num_seeds)))

    @property
    def updates(self) -> int:
        """Of every arm."""
        return 4 if self.quick else self.num_updates

    def claim(
        self,
        name: str,
        arms: Sequence[Arm],
        findings: Callable[..., Sequence[Finding]],
        **told: str,
    ) -> Claim:
        """Runs the arms and draws the findings.

        Args:
          name: of the claim's file in `experiments/claims`.
          arms: what is compared.
          findings: from the arms' numbers, {name: one for each seed}, in the arms' order.
          **told: milestone, statement, where, criterion and setting of the `Claim`.
        """
        ran = [self.measure(name, arm) for arm in arms]
        measured = [
            {name: np.array([one[name] for one in arm["seeds"]]) for name in arm["seeds"][0]}
            for arm in ran
        ]
        made = Claim(
            name=name,
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
        write_json(self.folder / f"{name}.json", made.to_json())
        return made

    def measure(self, claim: str, arm: Arm) -> dict[str, Any]:
        """Chooses the arm's learning rate, then runs it from each seed."""
        grid, tuned, seconds = self.learning_rates, {}, 0.0
        for rate in () if self.quick else grid:
            told = self.run(claim, arm, TUNING_SEED, rate)
            tuned[rate], seconds = told["measured"]["loss"], seconds + told["seconds"]
        best = min(tuned, key=lambda rate: tuned[rate]) if tuned else grid[0]
        ran = [self.run(claim, arm, seed, best) for seed in self.seeds]
        return {
            "learning_rate": best,
            "loss_by_learning_rate": {str(rate): loss for rate, loss in tuned.items()},
            "setting": arm.setting(),
            "seeds": [one["measured"] for one in ran],
            "seconds": seconds + sum(one["seconds"] for one in ran),
        }

    def run(self, claim: str, arm: Arm, seed: int, learning_rate: float) -> dict[str, Any]:
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
            f"{claim}  {arm.name}  seed {seed}  rate {learning_rate:g}  {numbers}  "
            f"{told['seconds']:.0f} s"
        )
        return told
