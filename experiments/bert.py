"""Trains a BERT on masked text: `lineage train bert --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import masked
from experiments.masked import MaskingConfig
from lineage_jax.data.text import TextData
from lineage_jax.models import bert
from lineage_jax.models.bert import Bert, BertConfig, MaskedLM, PreTraining
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertExperiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: TextData
    masking: MaskingConfig = dataclasses.field(
        default_factory=lambda: MaskingConfig(pairs="next", dynamic=False)
    )
    model: BertConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Reads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids, or rows longer, than the model has room for.
          OSError: if the text cannot be read.
        """
        return masked.task("bert", self)

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        paired, encoder = self.masking.pairs != "none", Bert(self.model)
        module = PreTraining(encoder) if paired else MaskedLM(encoder)
        losses = (masked.loss_fn(module, train=train, pairs=paired) for train in (True, False))
        return masked.program(self, module, *losses)


def tiny() -> BertExperiment:
    """Half a million parameters on bytes: two minutes on a laptop, to see everything work."""
    return BertExperiment(
        model=BertConfig(
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


def preset(model: BertConfig, *, rate: float) -> BertExperiment:
    """Devlin et al. 2018, appendix A.2: 256 rows of 512 tokens, a million steps.

    The paper's first 900,000 steps have rows of 128 tokens; here all have 512.
    """
    return BertExperiment(
        model=model,
        data=masked.text(model, batch_size=256),
        optimizer=OptimizerConfig(
            learning_rate=rate,
            schedule="linear",
            warmup_steps=10_000,
            b2=0.999,
            epsilon=1e-6,
            weight_decay=0.01,
            max_grad_norm=1.0,
        ),
        train=TrainConfig(num_steps=1_000_000),
    )


PRESETS: Mapping[str, Callable[[], BertExperiment]] = {
    "tiny": tiny,
    "base": lambda: preset(bert.bert_base(), rate=1e-4),
    "large": lambda: preset(bert.bert_large(), rate=1e-4),
}


def experiment(name: str = "tiny") -> BertExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
