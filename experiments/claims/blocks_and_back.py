"""Lu et al. 2025: heads choose the blocks that they read, and can read all again at any time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study import Arm, Claim, Recipe, Study, find, ratio_of_means
from experiments.study.keys_read import selected, share
from experiments.study.long_rows import Reader, batches, setting, sizes, text
from experiments.study.text import OPTIMIZER, heldout_loss, recipe
from experiments.study.training import programs
from lineage_jax.models import llama, moba
from lineage_jax.train.optim import learning_rate
from lineage_jax.train.state import TrainState
from lineage_jax.typing import Int, Params

SEQ_LEN = 512
SPARSE = moba.MobaConfig(**sizes(SEQ_LEN), block_size=16, top_k=3)  # the paper's 3, section 3.1
FULL = llama.LlamaConfig(**sizes(SEQ_LEN))
TENTH = 10
"""The last one in so many updates is of full attention (section 3.2)."""
BEFORE, AFTER = 50, 10
"""Updates around the switch: losses of those before are the band for losses of those after."""
STEPS_PER_CALL = 30


def claim(study: Study) -> Claim:
    """Lu et al. 2025, figure 3a, equation 2 and figure 5a."""
    study = dataclasses.replace(study, num_seeds=3, num_updates=600)
    compared: list[Arm] = [
        Reader(name="full", module=llama.Llama(FULL)),
        Switcher(name="blocks", module=moba.Moba(SPARSE), full=llama.Llama(FULL)),
    ]

    def findings(full, blocks):
        read = share(selected(SPARSE.block_size, SPARSE.top_k, SEQ_LEN))
        return [
            find(
                "held-out loss, blocks / full",
                ratio_of_means,
                blocks["loss"],
                full["loss"],
                wanted=(None, 1.01),
            ),
            find(
                "keys that are not read, of those that full attention reads",
                lambda sparsity: sparsity.mean(-1),
                np.full(len(study.seeds), 1 - read),
                wanted=(0.75, None),
            ),
            find(
                "largest difference of a logit from full attention's where all blocks are chosen, "
                "of the largest logit",
                lambda error: error.max(-1),
                blocks["all_blocks_error"],
                wanted=(None, 1e-5),
            ),
            find(
                f"highest loss of {AFTER} updates after the switch to full attention, in standard "
                f"deviations above the mean of {BEFORE} before",
                lambda spike: spike.max(-1),
                blocks["spike"],
                wanted=(None, 3.0),
            ),
        ]

    return study.claim(
        "blocks_and_back",
        compared,
        findings,
        milestone="moba",
        statement="a model whose heads read a few blocks that they choose has the loss of one with "
        "full attention, and goes over to it as it is",
        where="Lu et al. 2025, figures 3a and 5a",
        criterion="held-out loss at most 1.01 times that of full attention after as many updates, "
        "its interval too, where 75 % of the keys or more are not read; with all blocks chosen "
        "logits are full attention's to 1e-5 of the largest; where the last tenth of the updates "
        f"is of full attention, no loss of the first {AFTER} is three standard deviations above "
        f"the mean of the {BEFORE} before",
        setting=f"bytes of Python's standard library in rows of {SEQ_LEN}, two in a batch; two "
        "layers of 32, two heads of queries that share keys and values; three blocks of 16, the "
        "query's own among them; keys are counted over all queries of a row; the learning rate of "
        "each arm is the best of a grid on a seed that is not counted",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switcher:
    """A MoBA, and what becomes of it where the last updates are of full attention.

    Both are the same until then, and meet the same batches after.
    """

    name: str
    module: moba.Moba
    full: llama.Llama

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {**setting(self.module), "switch": [TENTH, BEFORE, AFTER]}

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`; held-out losses, and what the switch and all blocks change.

        "spike" is the highest loss of a batch after the switch, "spike_without" what it is on the
        same batches without one, both in standard deviations above the mean of those before.
        """
        sparse, full = recipe(self.module), recipe(self.full)
        switch = updates - max(1, updates // TENTH)
        meet = functools.partial(
            updated, stack=batches(SEQ_LEN, seed).stack, rates=rates(learning_rate, updates)
        )
        state, before = meet(sparse, first_state(sparse, seed), range(switch))
        copy = jax.tree.map(jnp.copy, state)  # what goes on gives it away
        on, after_on = meet(sparse, state, range(switch, updates))
        switched, after = meet(full, copy, range(switch, updates))
        before, heldout = before[-BEFORE:], text(SEQ_LEN).heldout

        def spike(losses: np.ndarray) -> float:
            return float((losses[:AFTER].max() - before.mean()) / before.std())

        return {
            "loss": heldout_loss(self.module, on.params, heldout),
            "loss_switched": heldout_loss(self.full, switched.params, heldout),
            "spike": spike(after),
            "spike_without": spike(after_on),
            "all_blocks_error": all_blocks_error(on.params, heldout(0)["tokens"]),
        }


def rates(peak: float, updates: int) -> np.ndarray:
    """The learning rate of each update."""
    optimizer = dataclasses.replace(OPTIMIZER, learning_rate=peak)
    return np.array([learning_rate(optimizer, i, updates) for i in range(updates)], np.float32)


def first_state(recipe: Recipe, seed: int) -> TrainState:
    """The state before the first update."""
    init, start, _ = programs(recipe)
    return start(init(jnp.int32(seed)), None, jnp.int32(seed))


def updated(
    recipe: Recipe,
    state: TrainState,
    steps: range,
    *,
    stack: Callable[[int, int], Any],
    rates: np.ndarray,
) -> tuple[TrainState, np.ndarray]:
    """The state after those updates, and the loss of each batch before its own.

    Raises:
      ValueError: an update was not finite.
    """
    losses = []
    for first in steps[::STEPS_PER_CALL]:
        some = rates[first : min(first + STEPS_PER_CALL, steps.stop)]
        state, metrics = programs(recipe)[2](state, stack(first, len(some)), some)
        if metrics["skipped"][0].sum():
            raise ValueError(f"updates at learning rate {rates.max():g} were not finite")
        total, count = (np.asarray(x, float) for x in metrics["loss"])
        losses.append(total / count)
    return state, np.concatenate(losses)


def all_blocks_error(params: Params, tokens: Int[np.ndarray, "B T"]) -> float:
    """The largest difference of a logit from full attention's, as a part of the largest logit.

    Args:
      params: of either, as they are the same.
      tokens: rows of them.
    """
    every = dataclasses.replace(SPARSE, top_k=-(-SEQ_LEN // SPARSE.block_size))
    chosen, whole = (
        np.asarray(jax.jit(module.apply)({"params": params}, tokens)[0])
        for module in (moba.Moba(every), llama.Llama(FULL))
    )
    return float(np.abs(chosen - whole).max() / np.abs(whole).max())
