"""Trains a translator with attention to translate: `lineage train bahdanau --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import translation
from lineage_jax.data.pairs import PairsData
from lineage_jax.models import bahdanau
from lineage_jax.models.bahdanau import Bahdanau, BahdanauConfig
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class BahdanauExperiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: PairsData
    model: BahdanauConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Reads the pairs and joins them with the model, the objective and the optimiser.

        Raises:
          ValueError: if the pairs have ids that the model has no row for.
          OSError: if they cannot be read.
        """
        return translation.task("bahdanau", self, Bahdanau(self.model))

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        rows = translation.rows(self.data)
        return translation.program(self.optimizer, Bahdanau(self.model), rows)


def tiny() -> BahdanauExperiment:
    """Numbers in English to numbers in French: five minutes on a laptop, to see everything work."""
    return BahdanauExperiment(
        model=BahdanauConfig(
            embed_dim=64,
            hidden_dim=96,
            alignment_dim=64,
            maxout_dim=64,
            source_vocab_size=64,
            vocab_size=64,
        ),
        data=PairsData(source_len=32, target_len=32, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, weight_decay=0.0),
        train=TrainConfig(num_steps=1000),
    )


def preset(model: BahdanauConfig) -> BahdanauExperiment:
    """Bahdanau et al. 2014, appendix B.2: RNNsearch-50, 667,000 updates of 80 pairs, clipped at 1.

    By Adam here, at the rate of its authors (Kingma and Ba 2015), where the paper has Adadelta.
    """
    return BahdanauExperiment(
        model=model,
        data=PairsData(vocab_size=model.vocab_size, batch_size=80),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="constant",
            warmup_steps=0,
            b2=0.999,
            weight_decay=0.0,
            max_grad_norm=1.0,
        ),
        train=TrainConfig(num_steps=667_000),
    )


PRESETS: Mapping[str, Callable[[], BahdanauExperiment]] = {
    "tiny": tiny,
    "rnnsearch": lambda: preset(bahdanau.rnnsearch()),
}


def experiment(name: str = "tiny") -> BahdanauExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
