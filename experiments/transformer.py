"""Trains a Transformer to translate: `lineage train transformer --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import translation
from lineage_jax.data.pairs import PairsData
from lineage_jax.models import transformer
from lineage_jax.models.transformer import StackConfig, Transformer, TransformerConfig
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig, noam_peak
from lineage_jax.train.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerExperiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: PairsData
    model: TransformerConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig
    smoothing: float = 0.1
    """Of the targets (Vaswani et al. 2017, section 5.4)."""

    def task(self) -> Task:
        """Reads the pairs and joins them with the model, the objective and the optimiser.

        Raises:
          ValueError: if the pairs have ids, or rows longer, than the model has room for.
          OSError: if they cannot be read.
        """
        return translation.task("transformer", self, Transformer(self.model))

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        rows = translation.rows(self.data)
        return translation.program(self.optimizer, Transformer(self.model), rows, self.smoothing)


def tiny() -> TransformerExperiment:
    """Numbers in English to numbers in French: two minutes on a laptop, to see everything work."""
    side = StackConfig(num_layers=2, num_heads=4, mlp_dim=256)
    return TransformerExperiment(
        model=TransformerConfig(
            encoder=side,
            decoder=side,
            embed_dim=64,
            source_vocab_size=64,
            vocab_size=64,
            max_len=32,
            shared_embeddings=False,
        ),
        data=PairsData(source_len=32, target_len=32, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, b2=0.98, weight_decay=0.0),
        train=TrainConfig(num_steps=1000),
    )


def preset(model: TransformerConfig, *, num_steps: int) -> TransformerExperiment:
    """Vaswani et al. 2017, sections 5.1 to 5.3: 25,000 tokens a batch, Adam, 4000 steps of warm-up.

    Rows are padded, and hold sentences of about 25 tokens: as many as fill 25,000.
    """
    return TransformerExperiment(
        model=model,
        data=PairsData(
            tokenizer="bpe",
            vocab_size=model.vocab_size,
            source_len=model.max_len,
            target_len=model.max_len,
            batch_size=1024,
        ),
        optimizer=OptimizerConfig(
            learning_rate=noam_peak(model.embed_dim, 4000),
            schedule="rsqrt",
            warmup_steps=4000,
            b1=0.9,
            b2=0.98,
            epsilon=1e-9,
            weight_decay=0.0,
            max_grad_norm=None,
        ),
        train=TrainConfig(num_steps=num_steps),
    )


PRESETS: Mapping[str, Callable[[], TransformerExperiment]] = {
    "tiny": tiny,
    "base": lambda: preset(transformer.transformer_base(), num_steps=100_000),
    "big": lambda: preset(transformer.transformer_big(), num_steps=300_000),
}


def experiment(name: str = "tiny") -> TransformerExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
