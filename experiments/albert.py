"""Trains an ALBERT on masked text: `lineage train albert --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import masked
from experiments.masked import MaskingConfig
from lineage_jax.data.text import TextData
from lineage_jax.models import albert
from lineage_jax.models.albert import Albert, AlbertConfig
from lineage_jax.models.bert import MaskedLM, PreTraining
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlbertExperiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: TextData
    masking: MaskingConfig = dataclasses.field(
        default_factory=lambda: MaskingConfig(pairs="order", dynamic=False)
    )
    model: AlbertConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Reads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids, or rows longer, than the model has room for.
          OSError: if the text cannot be read.
        """
        return masked.task("albert", self)

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        paired, encoder = self.masking.pairs != "none", Albert(self.model)
        module = PreTraining(encoder) if paired else MaskedLM(encoder)
        losses = (masked.loss_fn(module, train=train, pairs=paired) for train in (True, False))
        return masked.program(self, module, *losses)


def tiny() -> AlbertExperiment:
    """Half a million parameters on bytes: two minutes on a laptop, to see everything work."""
    return AlbertExperiment(
        model=AlbertConfig(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            vocab_size=261,
            max_len=128,
            table_dim=32,
        ),
        data=TextData(seq_len=128, batch_size=16, heldout_fraction=0.01),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
        train=TrainConfig(num_steps=1000),
    )


def preset(model: AlbertConfig, *, rate: float) -> AlbertExperiment:
    """Lan et al. 2019, section 4.1: 4096 rows of 512 tokens, 125,000 steps.

    By AdamW here, at the same rate, where the paper has LAMB (You et al. 2020); its warm-up is that
    of the released configuration.
    """
    return AlbertExperiment(
        model=model,
        data=masked.text(model, batch_size=4096),
        optimizer=OptimizerConfig(
            learning_rate=rate,
            schedule="linear",
            warmup_steps=3125,
            b2=0.999,
            epsilon=1e-6,
            weight_decay=0.01,
            max_grad_norm=1.0,
        ),
        train=TrainConfig(num_steps=125_000),
    )


PRESETS: Mapping[str, Callable[[], AlbertExperiment]] = {
    "tiny": tiny,
    "base": lambda: preset(albert.albert_base(), rate=1.76e-3),
    "large": lambda: preset(albert.albert_large(), rate=1.76e-3),
    "xlarge": lambda: preset(albert.albert_xlarge(), rate=1.76e-3),
    "xxlarge": lambda: preset(albert.albert_xxlarge(), rate=1.76e-3),
}


def experiment(name: str = "tiny") -> AlbertExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
