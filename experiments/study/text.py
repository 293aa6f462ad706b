"""What the claims on text have in common: how a model is trained, and its held-out loss."""

from typing import Any

from experiments import language
from experiments.study.heldout import heldout_means, one_pass
from experiments.study.training import Recipe
from lineage_jax.data.packing import Batches
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.typing import Params

OPTIMIZER = OptimizerConfig(warmup_steps=50)
"""Of every arm: AdamW with a cosine, as GPT-3's; the peak is chosen for each arm."""


def recipe(module: Any) -> Recipe:
    """A language model and the next-token objective."""
    return Recipe(module=module, init=language.init, loss_fn=language.loss_fn, optimizer=OPTIMIZER)


def heldout_loss(module: Any, params: Params, batches: Batches) -> float:
    """Cross-entropy over all batches, nats per token."""
    return heldout_means(module, language.loss_fn, params, one_pass(batches))["loss"]
