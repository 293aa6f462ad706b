"""Bahdanau et al. 2014: attention reads long sentences as well as short ones."""

import dataclasses

from experiments import bahdanau
from experiments.claims.source_reversal import fixed_vector
from experiments.study import Claim, Study, find
from experiments.study.translation import SPREAD, TranslationArm, number_pairs
from lineage_jax.models.bahdanau import Bahdanau


def claim(study: Study) -> Claim:
    """Bahdanau et al. 2014, figures 2 and 3: attention against one vector, as numbers get longer.

    The numbers with least and most digits are the short and the long ones.
    """
    pairs = number_pairs(quick=study.quick)
    without = fixed_vector(pairs, "without-attention")
    c = bahdanau.tiny().model
    model = dataclasses.replace(
        c,
        init_std=SPREAD * c.init_std,
        alignment_std=SPREAD * c.alignment_std,
    )
    attention = TranslationArm(name="attention", module=Bahdanau(model), data=pairs)

    def drop(arm):
        lengths = sorted(name for name in arm if name.startswith("exact_"))
        return arm[lengths[0]] - arm[lengths[-1]]

    def findings(without, attention):
        return [
            find(
                "drop of exact match from short to long, without attention - 3 x with it",
                lambda without, attention: (without - 3 * attention).mean(-1),
                drop(without),
                drop(attention),
                wanted=(0.0, None),
            ),
            find(
                "steps with the largest weight within one of the true source word",
                lambda share: share.mean(-1),
                attention["aligned"],
                wanted=(0.8, None),
            ),
        ]

    return study.claim(
        "long_sentences",
        [without, attention],
        findings,
        milestone="bahdanau",
        statement="a decoder with one vector for a sentence fails as sentences get longer, a "
        "decoder with attention does not, and it looks at the words that it translates",
        where="Bahdanau et al. 2014, figures 2 and 3",
        criterion="exact match drops from 3 to 9 digits at least 3 times as much without "
        "attention, interval too; at least 80 % of steps have the largest weight within one of the "
        "true word, interval too",
        setting="English to French numbers of 3 to 9 digits, 8000 pairs, source read forwards; "
        "LSTMs of 96 without attention, gated units of 96 with it; the learning rate of each arm "
        "is the best of a grid on a seed that is not counted. True source words of a French word "
        "are the English ones that say the same digit, or the same hundred, thousand or million; "
        "steps that write 'et' or the end symbol have none and are not counted; the words before "
        "are the true ones",
    )
