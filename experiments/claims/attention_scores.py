"""Luong et al. 2015: inner products score as well as a layer of their own does."""

import dataclasses

from experiments import luong
from experiments.study import Claim, Study, find, ratio_of_means
from experiments.study.translation import SPREAD, TranslationArm, number_pairs
from lineage_jax.models.luong import Luong, Score


def claim(study: Study) -> Claim:
    """Luong et al. 2015, table 4: four ways to score a source word, in one model.

    Table 4 has no `concat`, which section 3.1 lists and section 5.3 reports to do worse: it is the
    additive score, that of Bahdanau et al. 2014.
    """
    pairs = number_pairs(quick=study.quick, reverse_source=True)  # as in section 4.1
    study = dataclasses.replace(study, num_seeds=3)  # four arms, and slow ones
    c = luong.tiny().model
    shared = dataclasses.replace(
        c,
        num_layers=1,
        max_source_len=pairs.source_len,
        init_scale=SPREAD * c.init_scale,
        forget_bias=1.0,  # as in `seq2seq.fixed_vector`
    )
    scores: tuple[Score, ...] = ("location", "concat", "dot", "general")
    compared = [
        TranslationArm(
            name=score, module=Luong(dataclasses.replace(shared, score=score)), data=pairs
        )
        for score in scores
    ]

    def findings(location, concat, dot, general):
        errors = [1 - arm["exact"] for arm in (general, location)]
        close = (0.95, 1.05)
        return [
            find(
                "numbers not exact, general / location",
                ratio_of_means,
                *errors,
                wanted=(None, 0.8),
            ),
            *(
                find(
                    f"numbers exact, {name} / concat",
                    ratio_of_means,
                    arm["exact"],
                    concat["exact"],
                    wanted=close,
                )
                for name, arm in (("dot", dot), ("general", general))
            ),
        ]

    return study.claim(
        "attention_scores",
        compared,
        findings,
        milestone="luong",
        statement="scores that are inner products do as well as additive ones, and knowing the "
        "place alone does worse",
        where="Luong et al. 2015, section 5.3, table 4",
        criterion="general has at most 0.8 of location's mistakes, interval too; exact matches of "
        "dot and of general within 5 % of concat's, intervals too",
        setting="English to French numbers of 3 to 9 digits, 8000 pairs, source reversed; one LSTM "
        "of 96 on each side, global attention, input feeding; a mistake is a number that greedy "
        "search does not translate exactly; the learning rate of each arm is the best of a grid on "
        "a seed that is not counted",
    )
