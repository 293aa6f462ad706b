"""Trains a translator with attention to translate: `lineage train bahdanau --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import arms, claims, seq2seq, translation
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


def claim(study: claims.Study) -> claims.Claim:
    """Bahdanau et al. 2014, figures 2 and 3: attention against one vector, as numbers get longer.

    The numbers with least and most digits are the short and the long ones.
    """
    pairs = arms.number_pairs(quick=study.quick)
    without = seq2seq.fixed_vector(pairs, "without-attention")
    c = tiny().model
    model = dataclasses.replace(
        c, init_std=arms.SPREAD * c.init_std, alignment_std=arms.SPREAD * c.alignment_std
    )
    attention = arms.TranslationArm(name="attention", module=Bahdanau(model), data=pairs)

    def drop(arm):
        lengths = sorted(name for name in arm if name.startswith("exact_"))
        return arm[lengths[0]] - arm[lengths[-1]]

    def findings(without, attention):
        return [
            claims.find(
                "drop of exact match from short to long, without attention - 3 x with it",
                lambda without, attention: (without - 3 * attention).mean(-1),
                drop(without),
                drop(attention),
                wanted=(0.0, None),
            ),
            claims.find(
                "steps with the largest weight within one of the true source word",
                lambda share: share.mean(-1),
                attention["aligned"],
                wanted=(0.8, None),
            ),
        ]

    return study.claim(
        "bahdanau",
        [without, attention],
        findings,
        statement="a decoder with one vector for a sentence fails as sentences get longer, a "
        "decoder with attention does not, and it looks at the words that it translates",
        where="figures 2 and 3",
        criterion="exact match drops from 3 to 9 digits at least 3 times as much without "
        "attention, interval too; at least 80 % of steps have the largest weight within one of the "
        "true word, interval too",
        setting="English to French numbers of 3 to 9 digits, 8000 pairs, source read forwards; "
        "LSTMs of 96 without attention, gated units of 96 with it; the learning rate of each arm "
        "is the best of a grid on a seed that is not counted. True source words of a French word "
        "are the English ones that say the same digit, or the same hundred, thousand or million; "
        "steps that write 'et' or the end symbol have none and are not counted; the words before "
        "are the true ones",
    )
