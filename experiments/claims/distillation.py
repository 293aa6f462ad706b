"""Sanh et al. 2019: half the layers of a BERT keep most of what it understands."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments import masked
from experiments.distilbert import loss_fn as distilled_loss
from experiments.masked import MaskingConfig
from experiments.study import Claim, Recipe, Study, find, mean_difference, ratio_of_means, train
from experiments.study.encoders import (
    OPTIMIZER,
    UPDATES,
    EncoderArm,
    PythonText,
    heldout_loss,
    small,
)
from experiments.study.training import stack
from experiments.study.understanding import understands_kinds
from lineage_jax.models.bert import Bert, MaskedLM
from lineage_jax.models.distilbert import DistilBert, student_config, student_params
from lineage_jax.train.step import LossFn


@functools.cache
def taught_by(teacher: MaskedLM) -> Callable[..., LossFn]:
    """The objective of a student of that teacher, whose parameters are in `extra`."""
    return lambda student, *, train: distilled_loss(student, teacher, train=train)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentArm:
    """A teacher that is trained first, and its student: both are asked the same."""

    name: str
    teacher: EncoderArm
    student: EncoderArm

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {"teacher": self.teacher.setting(), "student": self.student.setting()}

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains a teacher, then a student for as many updates, on the same rows."""
        taught, arm = self.teacher, self.student
        streams = arm.data.streams(seed)
        rows = stack(arm.data.batches(streams[0], arm.masking, seed=seed))
        told: Any = dict(seed=seed, peak=learning_rate, updates=updates)
        objectives = (taught.module, taught.loss_fn), (arm.module, taught_by(taught.module))
        first, second = (
            Recipe(module=module, init=masked.init, loss_fn=loss_fn, optimizer=OPTIMIZER)
            for module, loss_fn in objectives
        )
        teacher = train(first, rows, **told)
        begins = student_params(teacher)
        student = train(second, rows, params=begins, extra={"teacher": teacher}, **told)
        return {
            **{name: ask(arm, student, streams, seed) for name, ask in arm.asks.items()},
            "teacher_kinds": understands_kinds(taught, teacher, streams, seed),
        }


def claim(study: Study) -> Claim:
    """Sanh et al. 2019, tables 1 and 4: a student, its teacher, and the same without a teacher."""
    study = dataclasses.replace(
        study, num_seeds=3, num_updates=UPDATES, learning_rates=(1e-3, 3e-3)
    )
    data = PythonText.of(study)
    config = small(num_layers=4)

    def arm(name: str, encoder: Any) -> EncoderArm:
        return EncoderArm(
            name=name,
            module=MaskedLM(encoder),
            loss_fn=masked.loss_fn,
            data=data,
            masking=MaskingConfig(),
            asks={"loss": heldout_loss, "kinds": understands_kinds},
        )

    alone = arm("alone", DistilBert(student_config(config)))
    taught = StudentArm(
        name="taught",
        teacher=arm("teacher", Bert(config)),
        student=dataclasses.replace(alone, name="student"),
    )

    def findings(alone, taught):
        return [
            find(
                "kinds of tokens told right, student / teacher",
                ratio_of_means,
                taught["kinds"],
                taught["teacher_kinds"],
                wanted=(0.97, None),
            ),
            find(
                "kinds of tokens told right, with a teacher - without",
                mean_difference,
                taught["kinds"],
                alone["kinds"],
                wanted=(0.0, None),
            ),
        ]

    return study.claim(
        "distillation",
        [alone, taught],
        findings,
        milestone="distilbert",
        statement="a student of half the layers keeps 97 % of what its teacher understands, and is "
        "better than the same network without a teacher",
        where="Sanh et al. 2019, sections 3 and 4, tables 1 and 4",
        criterion="at least 0.97 of the teacher's accuracy at telling the kind of a token, and "
        "more than without a teacher, intervals too",
        setting="a million tokens of the standard library, byte-pair encoding of 384; four layers "
        "of 48, two of them kept; 3000 updates of 16 rows of 48 tokens for each network; 200 "
        "updates of fine-tuning; the learning rate of each arm is the best of a grid on a seed "
        "that is not counted",
    )
