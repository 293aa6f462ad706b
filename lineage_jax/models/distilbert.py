"""DistilBERT: half of BERT's layers, taught by all of them.

Paper:       Sanh et al. 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper
             and lighter", section 3. https://arxiv.org/abs/1910.01108
Builds on:   bert.py, whose encoder it is, half as deep.
What is new: a language model is distilled before it is fine-tuned, from its teacher's probabilities
             and hidden states (`lineage_jax.objectives.distillation`); the student starts as every
             second layer of its teacher; no types, no pooler.
Departures:  every second layer from the first on; of a teacher's 12, the released weights started
             from layers 0, 2, 4, 7, 9 and 11.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from lineage_jax.models.bert import Bert, BertConfig, bert_base
from lineage_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig(BertConfig):
    """What must be chosen to build one DistilBERT."""

    num_types: int = 0
    """There is no table of types (section 3)."""


def distilbert_base() -> DistilBertConfig:
    """Sanh et al. 2019, table 3: printed as 66 M parameters."""
    return student_config(bert_base())


def student_config(teacher: BertConfig) -> DistilBertConfig:
    """Half as many layers, rounded up, and no types; all else as the teacher (section 3)."""
    settings = {
        field.name: getattr(teacher, field.name) for field in dataclasses.fields(BertConfig)
    }
    settings |= {"num_layers": (teacher.num_layers + 1) // 2, "num_types": 0}
    return DistilBertConfig(**settings)


class DistilBert(Bert):
    """BERT's encoder without types."""

    config: DistilBertConfig


def student_params(teacher: Params) -> dict[str, Any]:
    """The student's first parameters: layers 0, 2, 4 ... of its teacher, its tables (section 3).

    Args:
      teacher: parameters of a `Bert`, or of a model with heads on one, which are taken as they are,
        but for a pooler.
    """
    found: dict[str, Any] = {}
    for name, value in teacher.items():
        if name == "blocks":
            found[name] = jax.tree.map(lambda leaf: leaf[::2], value)
        elif name not in ("types", "pooler"):
            found[name] = student_params(value) if isinstance(value, Mapping) else value
    return found
