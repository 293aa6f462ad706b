"""Trains a GPT on text: `lineage train gpt --preset tiny`; then on labels:
`lineage train gpt --preset classify --start-from runs/gpt-tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import classification, language
from experiments.classification import Classification
from lineage_jax.data.labelled import LabelledData
from lineage_jax.data.labelled_batches import Marks
from lineage_jax.data.text import TextData
from lineage_jax.data.tokenizers import Tokenizer
from lineage_jax.models import gpt
from lineage_jax.models.gpt import Classifier, ClassifierConfig
from lineage_jax.objectives.labels import fine_tuning_loss
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program
from lineage_jax.train.step import LossFn
from scaling import flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTExperiment:
    """Everything that a GPT run depends on; the command line sets any field of it."""

    data: TextData
    model: gpt.GPTConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Loads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids, or rows longer, than the model has room for.
          OSError: if the text cannot be read.
        """
        return language.task("gpt", self, gpt.GPT(self.model), gpt.empty_cache)

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        cost = flops.gpt(self.model, self.data.seq_len)
        return language.program(self, gpt.GPT(self.model), cost.train())


NUM_MARKS = 3  # start, delimiter and extract tokens (Radford et al. 2018, section 3.3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTClassification(Classification):
    """Everything that fine-tuning a GPT on labels depends on."""

    model: ClassifierConfig
    """Its last three ids are the marks around texts, which its vocabulary had not before."""
    language_weight: float = 0.5
    """Of the text's own loss beside that of the labels: lambda of equation 5 (Radford et al. 2018,
    section 4.1)."""

    def task(self) -> Task:
        """Reads the texts, and joins them with the model, the objective and the optimiser.

        Raises:
          ValueError: if the texts have ids, rows longer, or more labels than the model has room
            for.
          OSError: if they, or what is begun with, cannot be read.
        """
        return classification.task("gpt", self, self.marks, lambda params: {"gpt": params})

    def program(self) -> Program:
        """What is compiled to train this, which needs neither texts nor weights."""
        module, cost = Classifier(self.model), flops.gpt(self.model, self.data.seq_len)
        losses = (
            classification_loss_fn(module, train=train, language_weight=self.language_weight)
            for train in (True, False)
        )
        return classification.program(self, module, cost.train(), *losses)

    def marks(self, tokenizer: Tokenizer) -> Marks:
        """The last ids of the vocabulary, or, if it has no room for them, those past it."""
        return marks_after(max(self.model.vocab_size - NUM_MARKS, tokenizer.vocab_size))

    def settled(self) -> "GPTClassification":
        """The same with a model like the one that it begins with, and as many labels as there are.

        Raises:
          OSError, ValueError: if it is no GPT, or it or the texts cannot be read.
        """
        model = classification.settled_model(
            self, gpt.GPTConfig, vocab_size=lambda size: size + NUM_MARKS
        )
        return dataclasses.replace(self, model=model)


def marks_after(num_tokens: int) -> Marks:
    """The three ids that follow those of the tokens."""
    start, between, end = range(num_tokens, num_tokens + NUM_MARKS)
    return Marks(start=start, between=between, end=end)


def classification_loss_fn(
    module: Classifier, *, train: bool, language_weight: float = 0.5
) -> LossFn:
    """The labels of rows and, beside them, the rows themselves (`fine_tuning_loss`)."""

    def loss(params, extra, batch, rng):
        found = module.apply(
            {"params": params},
            batch["tokens"],
            batch["mask"],
            train=train,
            rngs={"dropout": rng},
        )
        labels, tokens = found
        value, metrics = fine_tuning_loss(
            labels, batch["label"], tokens, batch["tokens"], batch["mask"], language_weight
        )
        return value, (extra, metrics)

    return loss


def preset(
    model: gpt.GPTConfig, *, rate: float, batch_tokens: int, num_steps: int, warmup_steps: int
) -> GPTExperiment:
    """A GPT of a paper's size, with that paper's learning rate and batch."""
    return language.preset(
        GPTExperiment,
        model,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=warmup_steps),
        batch_tokens=batch_tokens,
        num_steps=num_steps,
    )


def tiny() -> GPTExperiment:
    """Half a million parameters on bytes: two minutes on a laptop, to see everything work."""
    return GPTExperiment(
        model=gpt.GPTConfig(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            vocab_size=257,
            max_len=128,
        ),
        data=TextData(seq_len=128, batch_size=16, heldout_fraction=0.01),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        train=TrainConfig(num_steps=1000),
    )


def gpt1() -> GPTExperiment:
    """Radford et al. 2018, section 4.1: 64 rows of 512 tokens, 2000 steps of warm-up."""
    return preset(
        gpt.gpt1(), rate=2.5e-4, batch_tokens=64 * 512, num_steps=100_000, warmup_steps=2000
    )


def gpt2(model: gpt.GPTConfig, *, rate: float) -> GPTExperiment:
    """Radford et al. 2019, section 2.3: 512 rows of 1024 tokens.

    The paper prints neither learning rates nor steps; these are GPT-3's for that size, over as many
    tokens as nanoGPT's reproduction (300 B).
    """
    return preset(model, rate=rate, batch_tokens=512 * 1024, num_steps=600_000, warmup_steps=715)


def gpt3(model: gpt.GPTConfig, *, rate: float, batch_tokens: int) -> GPTExperiment:
    """Brown et al. 2020, table 2.1 and appendix B: 300 B tokens, 375 M of them warm-up."""
    return preset(
        model,
        rate=rate,
        batch_tokens=batch_tokens,
        num_steps=300_000_000_000 // batch_tokens,
        warmup_steps=375_000_000 // batch_tokens,
    )


def classifier(model: gpt.GPTConfig, *, dropout_rate: float = 0.1) -> ClassifierConfig:
    """The model with marks around texts, for eight labels: packages of Python."""
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    fields |= dict(vocab_size=model.vocab_size + NUM_MARKS, dropout_rate=dropout_rate)
    return ClassifierConfig(**fields, num_labels=8)


def classify() -> GPTClassification:
    """Which package of Python's a function is from: `tiny`, in ten epochs of some 950 functions.

    So small a model wants a larger rate than the paper's, and more epochs.
    """
    return GPTClassification(
        model=classifier(tiny().model),
        data=LabelledData(seq_len=128),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_steps=10),
        train=TrainConfig(num_steps=300),
    )


def gpt1_classify() -> GPTClassification:
    """Radford et al. 2018, section 4.1: 32 rows, a rate of 6.25e-5, three epochs, linear decay.

    The warm-up, 0.2 % of the steps, is none of 90; lambda is 0.5, and dropout 0.1.
    """
    return GPTClassification(
        model=classifier(gpt.gpt1()),
        data=LabelledData(seq_len=512),
        optimizer=OptimizerConfig(
            learning_rate=6.25e-5,
            schedule="linear",
            warmup_steps=0,
            b2=0.999,
            weight_decay=0.01,
        ),
        train=TrainConfig(num_steps=90),
    )


PRESETS: Mapping[str, Callable[[], GPTExperiment | GPTClassification]] = {
    "tiny": tiny,
    "classify": classify,
    "gpt1": gpt1,
    "gpt1_classify": gpt1_classify,
    "gpt2_small": lambda: gpt2(gpt.gpt2_small(), rate=6e-4),
    "gpt2_medium": lambda: gpt2(gpt.gpt2_medium(), rate=3e-4),
    "gpt2_large": lambda: gpt2(gpt.gpt2_large(), rate=2.5e-4),
    "gpt2_xl": lambda: gpt2(gpt.gpt2_xl(), rate=2e-4),
    # Learning rates and batches of table 2.1: 0.5 M tokens as 2^19, and so on.
    "gpt3_125m": lambda: gpt3(gpt.gpt3_125m(), rate=6e-4, batch_tokens=2**19),
    "gpt3_350m": lambda: gpt3(gpt.gpt3_350m(), rate=3e-4, batch_tokens=2**19),
    "gpt3_760m": lambda: gpt3(gpt.gpt3_760m(), rate=2.5e-4, batch_tokens=2**19),
    "gpt3_1_3b": lambda: gpt3(gpt.gpt3_1_3b(), rate=2e-4, batch_tokens=2**20),
    "gpt3_2_7b": lambda: gpt3(gpt.gpt3_2_7b(), rate=1.6e-4, batch_tokens=2**20),
    "gpt3_6_7b": lambda: gpt3(gpt.gpt3_6_7b(), rate=1.2e-4, batch_tokens=2**21),
    "gpt3_13b": lambda: gpt3(gpt.gpt3_13b(), rate=1e-4, batch_tokens=2**21),
    "gpt3_175b": lambda: gpt3(gpt.gpt3_175b(), rate=0.6e-4, batch_tokens=3 * 2**20 + 2**17),
}


def experiment(name: str = "tiny") -> GPTExperiment | GPTClassification:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
