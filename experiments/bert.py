"""Trains a BERT on masked text: `lineage train bert --preset tiny`; then on labels:
`lineage train bert --preset classify --start-from runs/bert-tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import classification, masked
from experiments.classification import Classification
from experiments.masked import MaskingConfig
from experiments.saved import is_run
from lineage_jax.data.labelled import LabelledData
from lineage_jax.data.labelled_batches import Marks
from lineage_jax.data.masking import special_tokens_after
from lineage_jax.data.text import TextData
from lineage_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from lineage_jax.models import bert
from lineage_jax.models.bert import Bert, BertConfig, MaskedLM, PreTraining, SequenceClassifier
from lineage_jax.objectives.labels import label_loss
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertClassification(Classification):
    """Everything that fine-tuning a BERT on labels depends on."""

    model: BertConfig

    def task(self) -> Task:
        """Reads the texts, and joins them with the model, the objective and the optimiser.

        Raises:
          ValueError: if the texts have ids, rows longer, or more labels than the model has room
            for.
          OSError: if they, or what is begun with, cannot be read.
        """
        return classification.task("bert", self, self.marks, encoder_and_pooler)

    def program(self) -> Program:
        """What is compiled to train this, which needs neither texts nor weights."""
        module, c = SequenceClassifier(Bert(self.model)), self.model
        losses = (classification_loss_fn(module, train=train) for train in (True, False))
        no_words = 6 * c.embed_dim * c.vocab_size  # are scored
        cost = masked.flops_per_token(c, self.data.seq_len) - no_words
        return classification.program(self, module, cost, *losses)

    def marks(self, tokenizer: Tokenizer) -> Marks:
        """[CLS] and [SEP] of a Hugging Face folder's tokenizer, or those of `MaskedBatches`.

        Raises:
          ValueError: if a folder's tokenizer has no such tokens.
        """
        if self.start_from is None or is_run(self.start_from):
            ours = special_tokens_after(tokenizer.vocab_size)
            return Marks(start=ours.cls, between=ours.sep, end=ours.sep, padding=ours.padding)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        cls, sep, padding = (tokenizer.id_of(name) for name in ("[CLS]", "[SEP]", "[PAD]"))
        if cls is None or sep is None:
            raise ValueError(f"{self.start_from}: wanted a tokenizer with [CLS] and [SEP]")
        return Marks(start=cls, between=sep, end=sep, padding=padding or 0)

    def settled(self) -> "BertClassification":
        """The same with a model like the one that it begins with, and as many labels as there are.

        Raises:
          OSError, ValueError: if it is no BERT, or it or the texts cannot be read.
        """
        return dataclasses.replace(self, model=classification.settled_model(self, BertConfig))


def encoder_and_pooler(params: Params) -> Params:
    """What of a trained BERT goes on: the encoder, and the pooler if pairs were learnt with it."""
    if "encoder" not in params:  # it is the encoder alone
        return {"encoder": params}
    return {name: params[name] for name in ("encoder", "pooler") if name in params}


def classification_loss_fn(module: SequenceClassifier, *, train: bool) -> LossFn:
    """The labels of rows."""
    types = module.encoder.config.num_types > 1

    def loss(params, extra, batch, rng):
        logits = module.apply(
            {"params": params},
            batch["tokens"],
            batch["types"] if types else None,
            mask=batch["mask"],
            train=train,
            rngs={"dropout": rng},
        )
        value, metrics = label_loss(logits, batch["label"], batch["mask"].any(-1))
        return value, (extra, metrics)

    return loss


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


def classify() -> BertClassification:
    """Which package of Python's a function is from: `tiny`, in ten epochs of some 950 functions.

    So small a model wants a larger rate than the paper's, and more epochs.
    """
    model = dataclasses.replace(tiny().model, num_labels=8, dropout_rate=0.1)
    return BertClassification(
        model=model,
        data=LabelledData(seq_len=128),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_steps=30),
        train=TrainConfig(num_steps=300),
    )


def base_classify() -> BertClassification:
    """Devlin et al. 2018, section 4.1 and A.3: 32 rows, a rate of 2e-5, three epochs.

    Of the rates that the paper tries this is the least; the warm-up is a tenth of the steps, and
    the decay linear, as in the released code.
    """
    return BertClassification(
        model=dataclasses.replace(bert.bert_base(), num_labels=8),
        data=LabelledData(seq_len=128),
        optimizer=OptimizerConfig(
            learning_rate=2e-5,
            schedule="linear",
            warmup_steps=9,
            b2=0.999,
            epsilon=1e-6,
            weight_decay=0.01,
        ),
        train=TrainConfig(num_steps=90),
    )


PRESETS: Mapping[str, Callable[[], BertExperiment | BertClassification]] = {
    "tiny": tiny,
    "classify": classify,
    "base": lambda: preset(bert.bert_base(), rate=1e-4),
    "base_classify": base_classify,
    "large": lambda: preset(bert.bert_large(), rate=1e-4),
}


def experiment(name: str = "tiny") -> BertExperiment | BertClassification:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
