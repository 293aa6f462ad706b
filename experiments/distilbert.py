"""Trains a DistilBERT: `lineage train distilbert --teacher runs/bert-tiny`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import bert, masked
from experiments.masked import MaskingConfig
from experiments.saved import open_run
from lineage_jax.data.text import TextData
from lineage_jax.models import distilbert
from lineage_jax.models.bert import Bert, BertConfig, MaskedLM, bert_base
from lineage_jax.models.distilbert import DistilBert, DistilBertConfig
from lineage_jax.objectives.distillation import student_loss
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import LossFn


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertExperiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: TextData
    masking: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)
    model: DistilBertConfig
    teacher_model: BertConfig
    """Of the teacher, which is frozen."""
    teacher: str | None = None
    """The run of a BERT, whose tables and every second layer the student begins with; without one
    both begin anew, and there is nothing to be learnt from the teacher."""
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Reads the text and the teacher, and joins them with model, objective and optimiser.

        Raises:
          ValueError: if there is no teacher, or it is no BERT of `teacher_model`; if the text has
            ids, or rows longer, than the model has room for.
          OSError: if the teacher or the text cannot be read.
        """
        return dataclasses.replace(masked.task("distilbert", self), first_state=self.taught)

    def program(self) -> Program:
        """What is compiled to train this, which needs neither data nor a teacher's weights."""
        student = MaskedLM(DistilBert(self.model))
        teacher = MaskedLM(Bert(self.teacher_model))
        losses = (loss_fn(student, teacher, train=train) for train in (True, False))
        made = masked.program(self, student, *losses)

        def init(key):
            ours, theirs = jax.random.split(key)
            return masked.init(student, ours), {"teacher": masked.init(teacher, theirs)}

        return dataclasses.replace(made, init=init)

    def taught(self, state: Any) -> TrainState:
        """The state with the teacher in it, and the student as it begins."""
        if self.teacher is None:
            raise ValueError("wanted --teacher, the run of a BERT: `lineage train bert` makes one")
        run = open_run(self.teacher)
        if run.milestone != "bert" or run.experiment.model != self.teacher_model:
            raise ValueError(
                f"wanted the run of a BERT with the settings of --teacher-model, got {self.teacher}"
            )
        encoder_and_head = {name: run.params[name] for name in ("encoder", "masked_lm")}
        student = distilbert.student_params(encoder_and_head)

        def place(new: Any, old: Any) -> jax.Array:  # a copy: the two share tables, and no buffers
            return jax.device_put(jnp.array(new, old.dtype, copy=True), old.sharding)

        return state.replace(
            params=jax.tree.map(place, student, state.params),
            extra={"teacher": jax.tree.map(place, encoder_and_head, state.extra["teacher"])},
        )


def loss_fn(student: MaskedLM, teacher: MaskedLM, *, train: bool) -> LossFn:
    """The student's: its teacher's probabilities, the truth, and the teacher's states."""

    def seen(module: MaskedLM, params: Any, batch: Any, **named: Any) -> tuple[Any, Any]:
        logits, found = module.apply(
            {"params": params},
            batch["tokens"],
            mask=batch["mask"],
            mutable=["intermediates"],
            **named,
        )
        return logits, found["intermediates"]["encoder"]["hidden"][0]

    def loss(params, extra, batch, rng):
        value, metrics = student_loss(
            *seen(student, params, batch, train=train, rngs={"dropout": rng}),
            *seen(teacher, extra["teacher"], batch),
            batch["targets"],
            batch["target_mask"],
            batch["mask"],
        )
        return value, (extra, metrics)

    return loss


def tiny() -> DistilBertExperiment:
    """Half of `lineage train bert --preset tiny`, without its pairs."""
    teacher = bert.tiny()
    return DistilBertExperiment(
        model=distilbert.student_config(teacher.model),
        teacher_model=teacher.model,
        data=teacher.data,
        optimizer=teacher.optimizer,
        train=TrainConfig(num_steps=500),
    )


def base() -> DistilBertExperiment:
    """Sanh et al. 2019, section 3: batches of up to 4000 rows, dynamic masks, no pairs.

    The rate, the warm-up and the steps, three epochs of BERT's text, are those of the released
    training.
    """
    model = distilbert.distilbert_base()
    return DistilBertExperiment(
        model=model,
        teacher_model=bert_base(),
        data=masked.text(model, batch_size=4000),
        optimizer=OptimizerConfig(
            learning_rate=5e-4,
            schedule="linear",
            warmup_steps=1000,
            b2=0.98,
            epsilon=1e-6,
            weight_decay=0.0,
            max_grad_norm=5.0,
        ),
        train=TrainConfig(num_steps=20_000),
    )


PRESETS: Mapping[str, Callable[[], DistilBertExperiment]] = {"tiny": tiny, "base": base}


def experiment(name: str = "tiny") -> DistilBertExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
