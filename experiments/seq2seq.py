"""Trains the LSTM encoder-decoder to translate: `lineage train seq2seq --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import arms, claims, translation
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


def claim(study: claims.Study) -> claims.Claim:
    """Sutskever et al. 2014, section 3.3: one LSTM each, sources read forwards or backwards."""
    pairs = arms.number_pairs(quick=study.quick)
    forward = fixed_vector(pairs, "forward")
    backward = fixed_vector(dataclasses.replace(pairs, reverse_source=True), "reversed")

    def findings(forward, backward):
        longest = max(name for name in forward if name.startswith("exact_"))
        return [
            claims.find(
                "cross-entropy, reversed / forward",
                claims.ratio_of_means,
                backward["loss"],
                forward["loss"],
                wanted=(None, 0.8),
                interval_wanted=(None, 1.0),
            ),
            claims.count(
                "seeds in which reversed has more of the longest numbers exact",
                backward[longest] > forward[longest],
                at_least=4,
            ),
        ]

    return study.claim(
        "seq2seq",
        [forward, backward],
        findings,
        statement="an LSTM that reads the source backwards learns to translate it more easily",
        where="section 3.3",
        criterion="cross-entropy of reversed at most 0.8 of forward's after 400 updates, interval "
        "below 1; exact match on 9 digits higher in at least 4 of 5 seeds",
        setting="English to French numbers of 3 to 9 digits, 8000 pairs; one LSTM of 96 on each "
        "side; the learning rate of each arm is the best of a grid on a seed that is not counted",
    )


def fixed_vector(pairs: PairsData, name: str) -> arms.TranslationArm:
    """A translator of one LSTM of 96 units on each side, and no attention.

    The forget gate starts open (Jozefowicz et al. 2015, section 2.2).
    """
    c = tiny().model
    model = dataclasses.replace(
        c, num_layers=1, hidden_dim=96, init_scale=arms.SPREAD * c.init_scale, forget_bias=1.0
    )
    return arms.TranslationArm(name=name, module=Seq2Seq(model), data=pairs)
