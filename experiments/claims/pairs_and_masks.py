"""Liu et al. 2019: BERT does without sentence pairs, and masks may be drawn anew."""

import dataclasses
from typing import Any

from experiments import masked
from experiments.masked import MaskingConfig
from experiments.study import Claim, Study, find, mean_difference, ratio_of_means
from experiments.study.encoders import (
    UPDATES,
    EncoderArm,
    PythonText,
    heldout_loss,
    masked_and_pairs,
    small,
)
from experiments.study.understanding import understands_kinds
from lineage_jax.models.bert import Bert, MaskedLM, PreTraining


def claim(study: Study) -> Claim:
    """Liu et al. 2019, tables 1 and 2: with pairs and without; masks drawn once or in each epoch.

    The text is short enough to be read some forty times, so that masks that are drawn once come
    back. The paper repeats ten masks forty times; here one mask is repeated.
    """
    study = dataclasses.replace(
        study, num_seeds=3, num_updates=UPDATES, learning_rates=(1e-3, 3e-3)
    )
    data = PythonText.of(study)
    if not study.quick:
        data = dataclasses.replace(data, num_tokens=50_000)

    def arm(name: str, pairs: Any, dynamic: bool) -> EncoderArm:
        paired = pairs != "none"
        return EncoderArm(
            name=name,
            module=(PreTraining if paired else MaskedLM)(Bert(small())),
            loss_fn=masked_and_pairs if paired else masked.loss_fn,
            data=data,
            masking=MaskingConfig(pairs=pairs, dynamic=dynamic),
            asks={"loss": heldout_loss, "kinds": understands_kinds},
        )

    arms = [
        arm("pairs", "next", True),
        arm("dynamic", "none", True),
        arm("static", "none", False),
    ]

    def findings(pairs, dynamic, static):
        return [
            find(
                "kinds of tokens told right, without pairs - with pairs",
                mean_difference,
                dynamic["kinds"],
                pairs["kinds"],
                wanted=(-0.005, None),
            ),
            find(
                "held-out loss, masks drawn anew / drawn once",
                ratio_of_means,
                dynamic["loss"],
                static["loss"],
                wanted=(None, 1.0),
            ),
        ]

    return study.claim(
        "pairs_and_masks",
        arms,
        findings,
        milestone="roberta",
        statement="next-sentence prediction can be left out without loss, and masks drawn anew in "
        "each epoch are no worse than masks drawn once",
        where="Liu et al. 2019, sections 4.1 and 4.2, tables 1 and 2",
        criterion="without pairs at most half a point below with pairs at telling the kind of a "
        "token, interval too; held-out loss with dynamic masks at most that with static ones, "
        "interval too",
        setting="50,000 tokens of the standard library, byte-pair encoding of 384; two layers of "
        "48, 3000 updates of 16 rows of 48 tokens; 200 updates of fine-tuning; the learning rate "
        "of each arm is the best of a grid on a seed that is not counted",
    )
