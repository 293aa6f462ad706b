"""Lan et al. 2019: whether two parts are in order is harder to tell than whether they belong."""

import dataclasses
import math
from typing import Any

import jax

from experiments.masked import MaskingConfig
from experiments.study import Claim, Study, find, ratio_of_means
from experiments.study.encoders import (
    UPDATES,
    EncoderArm,
    PythonText,
    heldout_loss,
    masked_and_pairs,
    small,
)
from experiments.study.understanding import understands_pairs
from lineage_jax.models.albert import Albert, AlbertConfig
from lineage_jax.models.bert import Bert, PreTraining
from lineage_jax.typing import Params


def num_params(arm: EncoderArm, params: Params, streams: Any, seed: int) -> float:
    """Of the encoder."""
    return float(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params["encoder"])))


def claim(study: Study) -> Claim:
    """Lan et al. 2019, table 5 and section 4.4: two objectives on pairs, each asked for both.

    An encoder is trained on pairs that follow one another or not ("next"), or that are in order or
    swapped ("order"). Then it stays as it is, and a new head learns to tell the other kind of
    pairs. Beside them an encoder of as many layers that shares none of them and has wide tables.
    """
    study = dataclasses.replace(
        study, num_seeds=3, num_updates=UPDATES, learning_rates=(1e-3, 3e-3)
    )
    data, wide = PythonText.of(study), small(num_layers=4)
    c = {field.name: getattr(wide, field.name) for field in dataclasses.fields(wide)}
    narrow = AlbertConfig(**c | {"table_dim": 16})

    def arm(name: str, encoder: Any, pairs: Any) -> EncoderArm:
        return EncoderArm(
            name=name,
            module=PreTraining(encoder),
            loss_fn=masked_and_pairs,
            data=data,
            masking=MaskingConfig(pairs=pairs),
            asks={
                "loss": heldout_loss,
                "num_params": num_params,
                "next": understands_pairs("next", frozen=True),
                "order": understands_pairs("order", frozen=True),
            },
        )

    arms = [
        arm("next", Albert(narrow), "next"),
        arm("order", Albert(narrow), "order"),
        arm("order-unshared", Bert(wide), "order"),
    ]

    def findings(following, order, unshared):
        return [
            find(
                "order told right, trained on what follows",
                lambda share: share.mean(-1),
                following["order"],
                wanted=(None, 0.55),
            ),
            find(
                "what follows told right, trained on order",
                lambda share: share.mean(-1),
                order["next"],
                wanted=(0.7, None),
            ),
            find(
                "parameters of the encoder, shared / not",
                ratio_of_means,
                order["num_params"],
                unshared["num_params"],
                wanted=(None, 0.3),
            ),
            find(
                "held-out loss, shared / not",
                ratio_of_means,
                order["loss"],
                unshared["loss"],
                wanted=(None, 1.03),
            ),
        ]

    return study.claim(
        "sentence_order",
        arms,
        findings,
        milestone="albert",
        statement="an encoder that learnt whether sentences follow one another cannot tell their "
        "order, one that learnt their order can tell both; shared layers and narrow tables cost "
        "little",
        where="Lan et al. 2019, sections 4.4 and 4.6, tables 2 and 5",
        criterion="trained on what follows, order told right at most 55 % of the time; trained on "
        "order, what follows at least 70 %; at least 70 % fewer parameters at a held-out loss at "
        "most 3 % higher; intervals too",
        setting="a million tokens of the standard library, byte-pair encoding of 384; four layers "
        "of 48, tables 16 wide, 3000 updates of 16 rows of 48 tokens; encoders stay as they are, "
        "and a pooler and a head learn to tell pairs in 200 updates; the learning rate of each arm "
        "is the best of a grid on a seed that is not counted",
    )
