"""Trains a Transformer to translate: `lineage train transformer --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import arms, claims, translation
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


def claim(study: claims.Study) -> claims.Claim:
    """Vaswani et al. 2017, table 3, rows A: one head of 64 against eight of 8, all else alike.

    Both have the same weights in number and cost the same: heads only share them out.
    """
    # Norms after each sublayer want smaller rates than LSTMs: "tiny" has 2e-3.
    study = dataclasses.replace(study, learning_rates=(1e-3, 3e-3))
    pairs = arms.number_pairs(
        quick=study.quick,
        target_language="de",
        tokenizer="bpe",  # a German number is a word or two
        vocab_size=512,
        source_len=32,
        target_len=24,
    )

    def arm(num_heads):
        side = StackConfig(num_layers=2, num_heads=num_heads, mlp_dim=256)
        model = dataclasses.replace(
            tiny().model,
            encoder=side,
            decoder=side,
            source_vocab_size=512,
            vocab_size=512,
            max_len=64,
            shared_embeddings=True,
        )
        return arms.TranslationArm(name=f"heads-{num_heads}", module=Transformer(model), data=pairs)

    def findings(one, eight):
        return [
            claims.find(
                "cross-entropy, one head - eight heads, nats per token",
                claims.mean_difference,
                one["loss"],
                eight["loss"],
                wanted=(0.0, None),
            )
        ]

    return study.claim(
        "transformer",
        [arm(1), arm(8)],
        findings,
        statement="one head of attention is worse than eight that cost the same",
        where="table 3, rows A",
        criterion="cross-entropy with one head above that with eight after 400 updates, interval "
        "above 0",
        setting="English to German numbers of 3 to 9 digits, 8000 pairs, byte-pair encoding of 512 "
        "tokens; two layers of 64 on each side; the learning rate of each arm is the best of a "
        "grid on a seed that is not counted",
    )
