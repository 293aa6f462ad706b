"""What the claims on text have in common: how a model is trained, and its held-out loss."""

import functools
from typing import Any

import jax
import numpy as np

from experiments import language
from experiments.study.training import Recipe
from lineage_jax.data.packing import Batches
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.typing import Params

OPTIMIZER = OptimizerConfig(warmup_steps=50)
"""Of every arm: AdamW with a cosine, as GPT-3's; the peak is chosen for each arm."""


def recipe(module: Any) -> Recipe:
    """A language model and the next-token objective."""
    return Recipe(module=module, init=language.init, loss_fn=language.loss_fn, optimizer=OPTIMIZER)


@functools.cache
def heldout_program(module: Any) -> Any:
    """Of parameters and a batch: the sum of the loss and the count of its targets."""
    loss_fn = language.loss_fn(module, train=False)
    return jax.jit(
        lambda params, batch: loss_fn(params, {}, batch, jax.random.key(0))[1][1]["loss"]
    )


def heldout_loss(module: Any, params: Params, batches: Batches) -> float:
    """Cross-entropy over all batches, nats per token."""
    evaluate = heldout_program(module)
    found = [evaluate(params, batches(step)) for step in range(batches.num_batches)]
    total, count = np.sum(np.asarray(found, np.float64), axis=0)
    return float(total / count)
