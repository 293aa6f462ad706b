"""Beam search finds what trying everything finds, and its beams never mix."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.sampling.beam import batch_axes, beam_search, length_penalty
from lineage_jax.sampling.decode import Sampling, generate

VOCAB, LENGTH, END = 4, 4, 0
WEIGHTS = np.random.default_rng(0).standard_normal((LENGTH + 1, VOCAB, VOCAB, VOCAB)) * 2


def decoder(tokens, positions, cache, mask=None):
    """Logits of the place, the last token and the one before, which the cache alone tells."""
    before, counts = cache  # [B], and [2, B]: rows on another axis
    last, at = tokens[:, 0], positions[:, 0]
    logits = jnp.asarray(WEIGHTS, jnp.float32)[at, before, last]
    return logits[:, None], (last, counts + 1)


def cache(rows):
    return jnp.zeros(rows, jnp.int32), jnp.zeros((2, rows), jnp.int32)


AXES = batch_axes(cache)
START = jnp.asarray([1, 3, 2])


def log_prob(start, ids):
    """Of a continuation, in float64."""
    total, before, last = 0.0, 0, start
    for place, token in enumerate(ids):
        logits = WEIGHTS[place, before, last]
        total += logits[token] - np.log(np.exp(logits).sum())
        before, last = last, token
    return total


def everything(start, alpha):
    """Every continuation that ends, the best first: (score, ids)."""
    found = []
    for size in range(1, LENGTH + 1):
        for ids in itertools.product(range(1, VOCAB), repeat=size - 1):
            ids = (*ids, END)
            found.append((log_prob(start, ids) / length_penalty(size, alpha), ids))
    return sorted(found, reverse=True)


def search(num_beams, alpha):
    run = jax.jit(
        lambda start: beam_search(
            decoder, cache(3), AXES, start, LENGTH, END, num_beams=num_beams, alpha=alpha
        )
    )
    ids, scores = run(START)
    return np.asarray(ids), np.asarray(scores)


def test_axes_are_where_the_rows_lie():
    assert AXES == (0, 1)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_a_beam_wide_enough_finds_the_best_of_everything(alpha):
    ids, scores = search(64, alpha)
    for row, start in enumerate(START.tolist()):
        for (score, expected), found, given in zip(
            everything(start, alpha)[:5], ids[row], scores[row], strict=False
        ):
            np.testing.assert_allclose(given, score, rtol=1e-5)
            assert found[: len(expected)].tolist() == list(expected)
            assert (found[len(expected) :] == END).all()


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_scores_are_those_of_the_tokens_and_fall_what_has_ended_first(num_beams):
    ids, scores = search(num_beams, 0.6)
    for found, given in zip((ids == END).any(-1), scores, strict=True):
        assert sorted(found, reverse=True) == found.tolist()
        for group in (given[found], given[~found]):
            assert (np.diff(group) <= 0).all()
    for row, start in enumerate(START.tolist()):
        for found, score in zip(ids[row], scores[row], strict=True):
            ends = np.flatnonzero(found == END)
            size = ends[0] + 1 if ends.size else LENGTH
            expected = log_prob(start, found[:size]) / length_penalty(size, 0.6)
            np.testing.assert_allclose(score, expected, rtol=1e-5)
        assert len({tuple(found) for found in ids[row].tolist()}) == num_beams


def test_one_beam_without_a_penalty_is_the_likeliest_token_after_another():
    ids, _ = search(1, 0.0)
    greedy = generate(
        decoder, cache(3), START[:, None], jnp.ones(3, jnp.int32), LENGTH,
        jax.random.key(0), Sampling(temperature=0.0), (END,),
    )  # fmt: skip
    np.testing.assert_array_equal(ids[:, 0], greedy)


def test_wu_s_penalty_is_one_for_one_token_and_grows():
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 1.0) == 2
    assert length_penalty(7, 0.0) == 1
