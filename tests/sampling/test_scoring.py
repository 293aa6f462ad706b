"""A continuation's score is the product of its tokens' probabilities, and of no others."""

import jax
import numpy as np
import pytest

from lineage_jax.sampling.scoring import score_continuations

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 7, 11)).astype(np.float32)
TOKENS = RNG.integers(11, size=(4, 7)).astype(np.int32)
STARTS, ENDS = np.array([1, 3, 6, 2]), np.array([7, 5, 7, 3])
score = jax.jit(score_continuations)


def test_a_score_is_that_of_a_loop_over_the_tokens():
    found = score(LOGITS, TOKENS, STARTS, ENDS)
    for row in range(4):
        total = 0.0
        for place in range(STARTS[row], ENDS[row]):
            logits = LOGITS[row, place - 1].astype(np.float64)
            total += logits[TOKENS[row, place]] - np.log(np.exp(logits).sum())
        assert found.log_prob[row] == pytest.approx(total, rel=1e-5)
        assert found.num_tokens[row] == ENDS[row] - STARTS[row]


def test_what_stands_before_and_after_a_continuation_is_not_scored():
    changed = TOKENS.copy()
    for row in range(4):
        changed[row, : STARTS[row]] = 5
        changed[row, ENDS[row] :] = 5
    for one, other in zip(
        score(LOGITS, TOKENS, STARTS, ENDS), score(LOGITS, changed, STARTS, ENDS), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_continuation_is_likeliest_if_every_token_of_it_is():
    best = np.concatenate([TOKENS[:, :1], LOGITS.argmax(-1)[:, :-1]], axis=1).astype(np.int32)
    assert score(LOGITS, best, STARTS, ENDS).likeliest.all()
    wrong = best.copy()
    wrong[1, 4] = (wrong[1, 4] + 1) % 11  # the last token of the second continuation
    assert score(LOGITS, wrong, STARTS, ENDS).likeliest.tolist() == [True, False, True, True]
    wrong[1] = best[1]
    wrong[1, 5] = (wrong[1, 5] + 1) % 11  # the first after it
    assert score(LOGITS, wrong, STARTS, ENDS).likeliest.all()
