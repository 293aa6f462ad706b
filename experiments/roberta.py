"""Trains a RoBERTa on masked text: `lineage train roberta --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import masked
from experiments.masked import MaskingConfig
from lineage_jax.data.text import TextData
from lineage_jax.models import roberta
from lineage_jax.models.roberta import RobertaConfig
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaExperiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: TextData
    masking: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)
    model: RobertaConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Reads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids, or rows longer, than the model has room for.
          OSError: if the text cannot be read.
        """
        return masked.task("roberta", self)

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        module = roberta.masked_lm(self.model)
        first = self.model.padding_id + 1  # position, whatever the text's padding is
        losses = (
            masked.loss_fn(module, train=train, first_position=first) for train in (True, False)
        )
        return masked.program(self, module, *losses)


def tiny() -> RobertaExperiment:
    """Half a million parameters on bytes: two minutes on a laptop, to see everything work."""
    return RobertaExperiment(
        model=RobertaConfig(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            vocab_size=261,
            max_len=128,
        ),
        data=TextData(seq_len=128, batch_size=16, heldout_fraction=0.01),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
        train=TrainConfig(num_steps=1000),
    )


def preset(model: RobertaConfig, *, rate: float) -> RobertaExperiment:
    """Liu et al. 2019, table 9: 8000 rows of 512 tokens, 500,000 steps."""
    return RobertaExperiment(
        model=model,
        data=masked.text(model, batch_size=8000),
        optimizer=OptimizerConfig(
            learning_rate=rate,
            schedule="linear",
            warmup_steps=24_000 if model.num_layers == 12 else 30_000,
            b2=0.98,
            epsilon=1e-6,
            weight_decay=0.01,
            max_grad_norm=None,
        ),
        train=TrainConfig(num_steps=500_000),
    )


PRESETS: Mapping[str, Callable[[], RobertaExperiment]] = {
    "tiny": tiny,
    "base": lambda: preset(roberta.roberta_base(), rate=6e-4),
    "large": lambda: preset(roberta.roberta_large(), rate=4e-4),
}


def experiment(name: str = "tiny") -> RobertaExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
