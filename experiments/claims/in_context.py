"""Brown et al. 2020: a model learns a task from examples in its context, a larger one more."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import language
from experiments.study import (
    Arm,
    Claim,
    Recipe,
    Study,
    find,
    mean_difference,
    ratio_of_means,
    train,
)
from experiments.study.regression import DIM, Fitter
from experiments.study.text import OPTIMIZER
from lineage_jax.data.demonstrations import random_mappings
from lineage_jax.models import gpt
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.train.metrics import config_json

NUM_KEYS, NUM_VALUES = 4, 8
NUM_SHOTS = 8  # examples of a mapping, at most
ROWS = 32  # in a batch


def claim(study: Study) -> Claim:
    """Brown et al. 2020, figure 1.2, and Garg et al. 2022, section 3, arXiv 2208.01066.

    To learn in context is what these models are trained for, over tasks that are all new (Garg et
    al. 2022 so train theirs): it does not emerge from text, as GPT-3's does.
    """
    study = dataclasses.replace(study, num_seeds=3, num_updates=2000)
    num_test = 100 if study.quick else 4000
    compared: list[Arm] = [
        Mapper(name="small", config=config(16), num_test=num_test),
        Mapper(name="large", config=config(64), num_test=num_test),
        Fitter(name="regression", config=config(64), num_test=num_test),
    ]

    def findings(small, large, regression):
        return [
            find(
                f"accuracy after {NUM_SHOTS} examples - after none, large, points",
                lambda after, before: 100 * mean_difference(after, before),
                large[f"accuracy_{NUM_SHOTS}"],
                large["accuracy_0"],
                wanted=(30.0, None),
            ),
            find(
                "rise of accuracy with each example, large - small, points",
                lambda large, small: 100 * mean_difference(large, small),
                slope(large),
                slope(small),
                wanted=(0.0, None),
            ),
            find(
                f"squared error after {2 * DIM} points, in context / least squares",
                ratio_of_means,
                regression[f"error_{2 * DIM}"],
                regression["least_squares"],
                wanted=(None, 2.0),
            ),
        ]

    return study.claim(
        "in_context",
        compared,
        findings,
        milestone="gpt",
        statement="a model learns a task from examples in its context, and a larger one learns "
        "more from each",
        where="Brown et al. 2020, figure 1.2; Garg et al. 2022, section 3",
        criterion="accuracy after 8 examples at least 30 points above that after none; a steeper "
        "rise of accuracy with examples in the large model than in the small; squared error after "
        "2 d points at most twice that of least squares; intervals too",
        setting="in-context learning is trained in, it does not emerge: 2000 updates of 32 rows, "
        "each of one random mapping from 4 keys to 8 values, by three layers, dense, banded and "
        "dense, 16 or 64 wide; or of 64 rows, each of one linear function of 3 numbers with noise "
        "of 0.5, 64 wide; the learning rate of each arm is the best of a grid on a seed that is "
        "not counted",
    )


def slope(arm: Mapping[str, np.ndarray]) -> np.ndarray:
    """By how much accuracy rises with each example: of the straight line closest to it, by seed."""
    shots = np.arange(NUM_SHOTS + 1)
    accuracy = np.stack([arm[f"accuracy_{k}"] for k in shots])
    return np.polyfit(shots, accuracy, 1)[0]


def config(width: int) -> gpt.GPTConfig:
    """GPT-3's dense and banded layers; weights start at 1 / sqrt(width), as 0.02 is for 768."""
    return gpt.GPTConfig(
        num_layers=3,
        embed_dim=width,
        num_heads=4,
        vocab_size=NUM_KEYS + NUM_VALUES,
        max_len=2 * (NUM_SHOTS + 1),
        local_window=4,
        init_std=1 / math.sqrt(width),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mapper:
    """A GPT-3 that reads rows of x, f(x), with a new f in each; it is asked for f(x) alone."""

    name: str
    config: gpt.GPTConfig
    num_test: int

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {
            "model": f"GPT {config_json(self.config)}",
            "data": f"random mappings of {NUM_KEYS} to {NUM_VALUES}, rows of {NUM_SHOTS + 1} pairs",
            "rows": [ROWS, self.num_test],
            "optimizer": config_json(OPTIMIZER),
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`; the loss, and the accuracy after so many examples of a new f."""
        module = gpt.GPT(self.config)
        recipe = Recipe(
            module=module, init=language.init, loss_fn=mapping_loss, optimizer=OPTIMIZER
        )

        def stack(first, count):
            return {"rows": np.stack([mappings(seed, first + i, ROWS) for i in range(count)])}

        params = train(recipe, stack, seed=seed, peak=learning_rate, updates=updates)
        # A step that no training comes to: f's that are new again.
        loss, right = mapping_program(module)(params, mappings(seed, 2**31, self.num_test))
        return {"loss": float(loss)} | {f"accuracy_{k}": float(a) for k, a in enumerate(right)}


def mappings(seed: int, step: int, rows: int) -> np.ndarray:
    """Of examples up to the last, and the pair that is asked for after them."""
    return random_mappings(
        seed, step, rows=rows, num_pairs=NUM_SHOTS + 1, num_keys=NUM_KEYS, num_values=NUM_VALUES
    )


def mapping_logits(module, params, rows):
    """Of each f(x), after x and the pairs before it."""
    return module.apply({"params": params}, rows[:, :-1])[0][:, ::2]


def mapping_loss(module, *, train):
    """The next-token objective, of f(x) alone: x cannot be known."""

    def loss(params, extra, batch, rng):
        logits, targets = mapping_logits(module, params, batch["rows"]), batch["rows"][:, 1::2]
        value, metrics = next_token_loss(logits, targets, jnp.ones(targets.shape, bool))
        return value, (extra, metrics)

    return loss


@functools.cache
def mapping_program(module: gpt.GPT) -> Any:
    """Of rows: the loss, and the share of right f(x) at each place."""

    @jax.jit
    def measure(params, rows):
        logits, targets = mapping_logits(module, params, rows), rows[:, 1::2]
        loss, _ = next_token_loss(logits, targets, jnp.ones(targets.shape, bool))
        return loss, (logits.argmax(-1) == targets).mean(0)

    return measure
