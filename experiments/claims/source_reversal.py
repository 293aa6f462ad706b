"""Sutskever et al. 2014: reading the source backwards makes it easier to translate."""

import dataclasses

from experiments import seq2seq
from experiments.study import Claim, Study, count, find, ratio_of_means
from experiments.study.translation import SPREAD, TranslationArm, number_pairs
from lineage_jax.data.pairs import PairsData
from lineage_jax.models.seq2seq import Seq2Seq


def claim(study: Study) -> Claim:
    """Sutskever et al. 2014, section 3.3: one LSTM each, sources read forwards or backwards."""
    pairs = number_pairs(quick=study.quick)
    forward = fixed_vector(pairs, "forward")
    backward = fixed_vector(dataclasses.replace(pairs, reverse_source=True), "reversed")

    def findings(forward, backward):
        longest = max(name for name in forward if name.startswith("exact_"))
        return [
            find(
                "cross-entropy, reversed / forward",
                ratio_of_means,
                backward["loss"],
                forward["loss"],
                wanted=(None, 0.8),
                interval_wanted=(None, 1.0),
            ),
            count(
                "seeds in which reversed has more of the longest numbers exact",
                backward[longest] > forward[longest],
                at_least=4,
            ),
        ]

    return study.claim(
        "source_reversal",
        [forward, backward],
        findings,
        milestone="seq2seq",
        statement="an LSTM that reads the source backwards learns to translate it more easily",
        where="Sutskever et al. 2014, section 3.3",
        criterion="cross-entropy of reversed at most 0.8 of forward's after 400 updates, interval "
        "below 1; exact match on 9 digits higher in at least 4 of 5 seeds",
        setting="English to French numbers of 3 to 9 digits, 8000 pairs; one LSTM of 96 on each "
        "side; the learning rate of each arm is the best of a grid on a seed that is not counted",
    )


def fixed_vector(pairs: PairsData, name: str) -> TranslationArm:
    """A translator of one LSTM of 96 units on each side, and no attention.

    The forget gate starts open (Jozefowicz et al. 2015, section 2.2).
    """
    c = seq2seq.tiny().model
    model = dataclasses.replace(
        c,
        num_layers=1,
        hidden_dim=96,
        init_scale=SPREAD * c.init_scale,
        forget_bias=1.0,
    )
    return TranslationArm(name=name, module=Seq2Seq(model), data=pairs)
