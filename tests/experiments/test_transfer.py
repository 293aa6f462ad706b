"""The claim on transfer: what endings are compared, what was learnt before, and the correlation."""

import numpy as np
import pytest

from experiments.claims.transfer import ENDING, other_text, rank_correlation, two_endings
from lineage_jax.data import LabelledData, load_labelled, python_text
from lineage_jax.data.tokenizers import ByteTokenizer


def test_the_correlation_is_that_of_ranks_and_the_mean_over_seeds():
    rising, falling = np.array([[0.1, 0.2, 0.9, 1.0], [4.0, 3.0, -2.0, -9.0]])
    assert rank_correlation(*rising[:, None]) == pytest.approx(1.0)
    assert rank_correlation(*np.stack([rising, falling], axis=1)) == pytest.approx(0.0)
    # d = 0, 1, -1, 0: 1 - 6 (1 + 1) / (4 (16 - 1)).
    assert rank_correlation(*np.array([[1.0], [3.0], [2.0], [4.0]])) == pytest.approx(0.8)


def test_equal_scores_share_their_rank_and_a_score_that_never_moves_follows_nothing():
    # Ranks 0.5, 0.5, 2 of 0, 1, 2: covariance 1.5 over sqrt(1.5 x 2).
    tied = rank_correlation(*np.array([[1.0], [1.0], [2.0]]))
    assert tied == pytest.approx(1.5 / np.sqrt(1.5 * 2))
    assert rank_correlation(*np.ones((3, 2))) == 0.0


def test_the_correlation_of_draws_of_seeds_is_one_for_each_draw():
    scores = np.random.default_rng(0).random((5, 7, 3))
    found = rank_correlation(*scores)
    assert found.shape == (7,)
    assert found[4] == pytest.approx(rank_correlation(*scores[:, 4]))


def test_two_endings_have_one_context_and_are_of_two_packages():
    texts = load_labelled(LabelledData(heldout_fraction=0.1))
    rows = two_endings(texts, 96)
    np.testing.assert_array_equal(rows[:, 0, :-ENDING], rows[:, 1, :-ENDING])
    label = {}
    for example in texts.heldout_text.examples:
        ids = texts.tokenizer.encode(example.texts[0])[:96]
        label[tuple(ids[-ENDING:].tolist())] = example.label
    for own, other in rows:
        assert label[tuple(own[-ENDING:].tolist())] != label[tuple(other[-ENDING:].tolist())]
    endings = {tuple(other[-ENDING:].tolist()) for _, other in rows}
    assert len(endings) > 0.9 * len(rows)  # no function is the other ending of many


def test_no_function_that_is_told_apart_was_learnt_before():
    functions = load_labelled(LabelledData(heldout_fraction=0.9)).heldout_text.examples

    def told(text):  # as they stand there: those at the top of a module that name no package
        return [one.name for one in functions if one.texts[0] in text]

    assert not told(ByteTokenizer().decode(other_text().ids))
    assert len(told("\n".join(one.text for one in python_text().documents))) > 100
