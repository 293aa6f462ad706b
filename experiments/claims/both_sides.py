"""Devlin et al. 2018: an encoder that reads both ways understands more than one that reads on."""

import dataclasses
from typing import Any

from flax import linen as nn

from experiments import masked
from experiments.masked import MaskingConfig
from experiments.study import Claim, Study, find, mean_difference
from experiments.study.encoders import (
    UPDATES,
    EncoderArm,
    PythonText,
    heldout_loss,
    masked_and_pairs,
    small,
)
from experiments.study.understanding import understands_kinds, understands_pairs
from lineage_jax.models.bert import Bert, MaskedLM, PreTraining
from lineage_jax.nn import Mask
from lineage_jax.objectives.masked import masked_token_loss
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Array, Float


class LeftToRight(Bert):
    """BERT's encoder, each position of which reads those before alone."""

    def run_blocks(
        self, x: Float[Array, "B T D"], reads: Mask, train: bool
    ) -> Float[Array, "B T D"]:
        return super().run_blocks(x, dataclasses.replace(reads, causal=True), train)


def next_token(module: nn.Module, *, train: bool) -> LossFn:
    """The objective of a language model, on rows of which nothing is left out."""

    def loss(params: Any, extra: Any, batch: Any, rng: Any) -> Any:
        tokens, mask = batch["targets"], batch["mask"]
        logits: Any = module.apply(
            {"params": params}, tokens, mask=mask, train=train, rngs={"dropout": rng}
        )
        value, metrics = masked_token_loss(logits[:, :-1], tokens[:, 1:], mask[:, 1:])
        return value, (extra, metrics)

    return loss


def claim(study: Study) -> Claim:
    """Devlin et al. 2018, table 5: BERT, the same without sentence pairs, and left to right.

    Two tasks, each by fine-tuning the whole encoder under a new head: which kind of token a piece
    of Python belongs to, and whether the second part of a row follows the first.
    """
    study = dataclasses.replace(
        study, num_seeds=3, num_updates=UPDATES, learning_rates=(1e-3, 3e-3)
    )
    data = PythonText.of(study)
    asks = {
        "loss": heldout_loss,
        "kinds": understands_kinds,
        "pairs": understands_pairs("next"),
    }

    def arm(name: str, module: Any, loss_fn: Any, pairs: Any) -> EncoderArm:
        return EncoderArm(
            name=name,
            module=module,
            loss_fn=loss_fn,
            data=data,
            masking=MaskingConfig(pairs=pairs),
            asks=asks,
        )

    arms = [
        arm("bert", PreTraining(Bert(small())), masked_and_pairs, "next"),
        arm("without-pairs", MaskedLM(Bert(small())), masked.loss_fn, "none"),
        arm("left-to-right", MaskedLM(LeftToRight(small())), next_token, "none"),
    ]

    def findings(bert, without, onward):
        return [
            find(
                "kinds of tokens told right, both ways - left to right",
                mean_difference,
                without["kinds"],
                onward["kinds"],
                wanted=(0.02, None),
            ),
            find(
                "pairs told right, trained with pairs - without",
                mean_difference,
                bert["pairs"],
                without["pairs"],
                wanted=(0.0, None),
            ),
        ]

    return study.claim(
        "both_sides",
        arms,
        findings,
        milestone="bert",
        statement="an encoder that reads both ways understands tokens better than one that reads "
        "left to right, and next-sentence prediction helps with pairs",
        where="Devlin et al. 2018, section 5.1, table 5",
        criterion="masked training at least 2 points above left to right at telling the kind of a "
        "token, interval too; training with pairs above training without at telling pairs, "
        "interval above 0",
        setting="a million tokens of the standard library, byte-pair encoding of 384; two layers "
        "of 48, 3000 updates of 16 rows of 48 tokens; 200 updates of fine-tuning on each task; the "
        "learning rate of each arm is the best of a grid on a seed that is not counted",
    )
