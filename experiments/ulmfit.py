"""Trains AWD-LSTM, and ULMFiT from it in three stages:

lineage train ulmfit --preset tiny                                      a language model
lineage train ulmfit --preset tune --start runs/ulmfit-tiny             the same, on other text
lineage train ulmfit --preset classify --start runs/ulmfit-tune         a classifier
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import classification, language
from experiments.saved import open_run
from experiments.speaking import text_tokenizer
from experiments.ulmfit_tuning import (
    ULMFiTClassification,
    depth_in_language_model,
    schedule,
    sized_as,
)
from lineage_jax import sharding
from lineage_jax.data import packing
from lineage_jax.data.labelled import LabelledData
from lineage_jax.data.text import TextData
from lineage_jax.models import ulmfit
from lineage_jax.models.ulmfit import ClassifierConfig, ULMFiT, ULMFiTConfig
from lineage_jax.objectives.activation import activation_penalty, slowness_penalty
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.sharding import MeshConfig
from lineage_jax.train import averaging
from lineage_jax.train.averaging import AveragedSGDConfig
from lineage_jax.train.layerwise import LayerwiseConfig, layerwise_adam
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.program import Program
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """How much the outputs of the last layer cost (Merity et al. 2017, section 5)."""

    activation: float = 2.0
    """Their squares, alpha."""
    slowness: float = 1.0
    """Those of their changes from token to token, beta."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULMFiTExperiment:
    """Stage one, AWD-LSTM: everything that a run depends on; the command line sets any field."""

    data: TextData
    model: ULMFiTConfig
    penalties: PenaltyConfig = dataclasses.field(default_factory=PenaltyConfig)
    optimizer: AveragedSGDConfig = dataclasses.field(default_factory=AveragedSGDConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Loads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids, or rows longer, than the model has room for.
          OSError: if the text cannot be read.
        """
        return dataclasses.replace(
            language_task(self),
            learning_rate=lambda step: self.optimizer.learning_rate,
            after_evaluation=heed,
        )

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""

        def init(key):
            params = language.init(ULMFiT(self.model), key)
            return params, {"average": averaging.begin(params, self.optimizer.patience)}

        def after(params, extra):
            return {"average": averaging.after_step(params, extra["average"])}

        return dataclasses.replace(
            language_program(self, averaging.sgd()),
            init=init,
            after=after,
            in_use=lambda params, extra: averaging.in_use(params, extra["average"]),
        )


def heed(state: Any, means: Mapping[str, float]) -> TrainState:
    """Begins to average parameters when evaluations no longer improve."""
    average = state.extra["average"]
    told = jax.jit(
        averaging.after_evaluation, out_shardings=jax.tree.map(lambda x: x.sharding, average)
    )(state.params, average, jnp.float32(means["loss"]), state.step)
    return state.replace(extra={"average": told})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULMFiTTuning:
    """Stage two: a language model learns the text of its task, each layer at a rate of its own."""

    data: TextData
    start_from: str | None = None
    """The run of stage one, whose sizes and weights it begins with; there must be one to train."""
    model: ULMFiTConfig
    penalties: PenaltyConfig = dataclasses.field(default_factory=PenaltyConfig)
    optimizer: LayerwiseConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Loads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if `start_from` is missing, or has other tokens; if the text has ids, or rows
            longer, than the model has room for.
          OSError: if the run or the text cannot be read.
        """
        if self.start_from is None:
            raise ValueError(
                "wanted --start-from, the run of a language model: `lineage train ulmfit` makes one"
            )
        made, run = language_task(self), open_run(self.start_from)
        if text_tokenizer(self.start_from, run).digest != made.provenance["tokenizer_digest"]:
            raise ValueError(
                f"the tokens of this text are not those of {self.start_from}; give the "
                "tokenizer.json that it was trained with as --data.tokenizer"
            )
        return dataclasses.replace(
            made,
            learning_rate=schedule(self.optimizer, self.train),
            first_state=lambda state: started(state, run.params),
        )

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        tx = layerwise_adam(self.optimizer, depth_in_language_model(self.model))
        return language_program(self, tx)

    def settled(self) -> "ULMFiTTuning":
        """The same with the sizes of the model that it begins with.

        Raises:
          OSError, ValueError: if that is no AWD-LSTM, or cannot be read.
        """
        return dataclasses.replace(self, model=sized_as(self.start_from, self.model))


def started(state: Any, params: Params) -> TrainState:
    """The state with the parameters that were learnt before."""
    return state.replace(params=classification.begun(state.params, params))


def language_task(experiment: ULMFiTExperiment | ULMFiTTuning) -> Task:
    """Loads the text of either stage."""
    return language.task("ulmfit", experiment, ULMFiT(experiment.model), ulmfit.empty_cache)


def language_program(
    experiment: ULMFiTExperiment | ULMFiTTuning, tx: optax.GradientTransformation
) -> Program:
    """What the language models of both stages have in common."""
    model, data = experiment.model, experiment.data
    module = ULMFiT(model)
    return Program(
        init=lambda key: (language.init(module, key), {}),
        loss_fn=loss_fn(module, experiment.penalties, train=True),
        eval_loss_fn=loss_fn(module, experiment.penalties, train=False),
        tx=tx,
        batch=sharding.named(packing.shapes(data.batch_size, data.seq_len), ("batch", "length")),
        # Six for each weight and token that meet (Kaplan et al. 2020, section 2.1): to look words
        # up in the table costs nothing, to score them by it does.
        flops_per_token=6 * ulmfit.num_params(model)["total"],
        max_grad_norm=experiment.optimizer.max_grad_norm,
    )


def loss_fn(module: ULMFiT, penalties: PenaltyConfig = PenaltyConfig(), *, train: bool) -> LossFn:
    """The next-token objective, in training with penalties; metrics are without."""

    def loss(params, extra, batch, rng):
        (logits, _), found = module.apply(
            {"params": params},
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            train=train,
            rngs={"dropout": rng},
            mutable=["intermediates"],
        )
        value, metrics = next_token_loss(logits, batch["targets"], batch["mask"])
        if train:
            encoder = found["intermediates"]["encoder"]
            (hidden,), (raw,) = encoder["hidden"], encoder["raw"]
            value += penalties.activation * activation_penalty(hidden, batch["mask"])
            value += penalties.slowness * slowness_penalty(raw, batch["segment_ids"], batch["mask"])
        return value, (extra, metrics)

    return loss


def tiny() -> ULMFiTExperiment:
    """A third of a million parameters on bytes: minutes on a laptop, to see everything work.

    So small a model underfits, and drops less than the paper's.
    """
    return ULMFiTExperiment(
        model=ULMFiTConfig(
            num_layers=2,
            embed_dim=96,
            hidden_dim=192,
            vocab_size=257,
            max_len=128,
            embed_dropout_rate=0.0,
            input_dropout_rate=0.05,
            hidden_dropout_rate=0.05,
            dropout_rate=0.05,
            weight_dropout_rate=0.1,
        ),
        data=TextData(seq_len=128, batch_size=16, heldout_fraction=0.01),
        penalties=PenaltyConfig(activation=0.0, slowness=0.0),
        train=TrainConfig(num_steps=1000, eval_every=100),
    )


def awd_lstm(model: ULMFiTConfig, *, batch_size: int, epoch: int, epochs: int) -> ULMFiTExperiment:
    """Merity et al. 2017, section 5; `epoch` is in steps, and an evaluation follows each."""
    return ULMFiTExperiment(
        model=model,
        data=text(model, batch_size),
        train=TrainConfig(num_steps=epochs * epoch, eval_every=epoch),
    )


def text(model: ULMFiTConfig, batch_size: int) -> TextData:
    """Tokens of a BPE as large as the model's vocabulary, until others are given."""
    return TextData(
        tokenizer="bpe",
        vocab_size=model.vocab_size,
        seq_len=model.max_len,
        batch_size=batch_size,
    )


def tune() -> ULMFiTTuning:
    """Stage two for `tiny`."""
    small = tiny()
    return ULMFiTTuning(
        model=small.model,
        data=small.data,
        penalties=small.penalties,
        optimizer=LayerwiseConfig(learning_rate=0.004),
        train=TrainConfig(num_steps=300),
    )


def classify() -> ULMFiTClassification:
    """Stage three for `tiny`: functions of Python's, by the package that they come from."""
    return ULMFiTClassification(
        model=ClassifierConfig(**vars(tiny().model), num_labels=8),
        data=LabelledData(seq_len=128, batch_size=32),
        optimizer=LayerwiseConfig(unfreeze_every=25),
        train=TrainConfig(num_steps=300, eval_every=50),
    )


def wikitext103() -> ULMFiTExperiment:
    """Howard and Ruder 2018, sections 3.1 and 4.1: stage one, on 103 million words.

    The paper prints neither batch nor epochs of this stage: the batch is that of the others, the
    optimiser AWD-LSTM's, and ten epochs are a choice.
    """
    return awd_lstm(ulmfit.ulmfit_2018(), batch_size=64, epoch=103_000_000 // (64 * 70), epochs=10)


PRESETS: Mapping[str, Callable[[], Any]] = {
    "tiny": tiny,
    "tune": tune,
    "classify": classify,
    # 929,590 and 2,088,628 words of training text, in rows of 70; 750 epochs.
    "ptb": lambda: awd_lstm(ulmfit.awd_lstm_ptb(), batch_size=40, epoch=332, epochs=750),
    "wikitext2": lambda: awd_lstm(
        ulmfit.awd_lstm_wikitext2(), batch_size=80, epoch=373, epochs=750
    ),
    "wikitext103": wikitext103,
}


def experiment(name: str = "tiny") -> Any:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
