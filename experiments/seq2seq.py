"""Trains the LSTM encoder-decoder to translate: `lineage train seq2seq --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import translation
from lineage_jax.data.pairs import PairsData
from lineage_jax.models import seq2seq
from lineage_jax.models.seq2seq import Seq2Seq, Seq2SeqConfig
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqExperiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: PairsData
    model: Seq2SeqConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Reads the pairs and joins them with the model, the objective and the optimiser.

        Raises:
          ValueError: if the pairs have ids that the model has no row for.
          OSError: if they cannot be read.
        """
        return translation.task("seq2seq", self, Seq2Seq(self.model))

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        rows = translation.rows(self.data)
        return translation.program(self.optimizer, Seq2Seq(self.model), rows)


def tiny() -> Seq2SeqExperiment:
    """Numbers in English to numbers in French: two minutes on a laptop, to see everything work."""
    return Seq2SeqExperiment(
        model=Seq2SeqConfig(
            num_layers=2,
            embed_dim=64,
            hidden_dim=128,
            source_vocab_size=64,
            vocab_size=64,
        ),
        data=PairsData(source_len=32, target_len=32, batch_size=64, reverse_source=True),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, weight_decay=0.0),
        train=TrainConfig(num_steps=1000),
    )


def preset(model: Seq2SeqConfig) -> Seq2SeqExperiment:
    """Sutskever et al. 2014, section 3.4: 7.5 epochs of 12 M pairs, 128 a batch, clipped at 5.

    By Adam here, at the rate of its authors (Kingma and Ba 2015), where the paper has plain SGD.
    """
    return Seq2SeqExperiment(
        model=model,
        data=PairsData(vocab_size=model.vocab_size, batch_size=128, reverse_source=True),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="constant",
            warmup_steps=0,
            b2=0.999,
            weight_decay=0.0,
            max_grad_norm=5.0,
        ),
        train=TrainConfig(num_steps=90_000_000 // 128),
    )


PRESETS: Mapping[str, Callable[[], Seq2SeqExperiment]] = {
    "tiny": tiny,
    "sutskever": lambda: preset(seq2seq.seq2seq_2014()),
}


def experiment(name: str = "tiny") -> Seq2SeqExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
