"""RNNsearch is appendix A word by word, and its weights are a distribution over the source."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lineage_jax.models import bahdanau
from lineage_jax.models.bahdanau import Bahdanau, BahdanauConfig, additive_scores, alignment
from tests.models import translation
from tests.models.translation import (
    LENGTHS,
    MASK,
    SOURCE,
    SOURCE_LENGTHS,
    SOURCE_MASK,
    TOKENS,
    alignments,
    assert_gradients,
    params_of,
)
from tests.nn.closeness import assert_same

TINY = BahdanauConfig(
    embed_dim=5, hidden_dim=7, alignment_dim=6, maxout_dim=4, source_vocab_size=23, vocab_size=19
)
MODEL = Bahdanau(TINY)


def unit(params, x, h):
    """Appendix A.1.1, from x = W e (+ C c) + b of the three gates, for one word."""
    u = params["recurrent"]
    z = jax.nn.sigmoid(x[0] + h @ u[:, 0])
    r = jax.nn.sigmoid(x[1] + h @ u[:, 1])
    return (1 - z) * h + z * jnp.tanh(x[2] + (r * h) @ u[:, 2])


def read(params, words):
    """The states after each word, from a state of zeros."""
    h, states = jnp.zeros(TINY.hidden_dim), []
    for e in words:
        x = jnp.stack([e @ params["kernel"][:, gate] + params["bias"][gate] for gate in range(3)])
        h = unit(params, x, h)
        states.append(h)
    return states


def by_hand(params, source, tokens):
    """Appendix A.2, one sentence and one word at a time: logits [T, V] and weights [T, S]."""
    words = [params["encoder"]["embed"]["table"][i] for i in source]
    forward = read(params["encoder"]["forward"], words)
    backward = read(params["encoder"]["backward"], words[::-1])[::-1]
    annotations = [jnp.concatenate(pair) for pair in zip(forward, backward, strict=True)]
    s = jnp.tanh(backward[0] @ params["initial"]["kernel"] + params["initial"]["bias"])
    logits, rows = [], []
    for y in tokens:
        e = params["embed"]["table"][y]
        query, key = s @ params["align_query"], params["align_key"]
        scores = jnp.stack(
            [
                jnp.tanh(query + h @ key["kernel"] + key["bias"]) @ params["align_vector"]
                for h in annotations
            ]
        )
        exponentials = jnp.exp(scores)
        weights = exponentials / exponentials.sum()
        c = sum(weight * h for weight, h in zip(weights, annotations, strict=True))
        deep = s @ params["from_state"]["kernel"] + params["from_state"]["bias"]
        deep += e @ params["from_word"]["kernel"] + c @ params["from_context"]["kernel"]
        maxout = jnp.stack([deep[2 * j : 2 * j + 2].max() for j in range(TINY.maxout_dim)])
        logits.append(params["head"]["table"] @ maxout)
        rows.append(weights)
        gru = params["gru"]
        x = [
            e @ gru["kernel"][:, k] + gru["bias"][k] + c @ params["context"][:, k]
            for k in (0, 1, 2)
        ]
        s = unit(gru, jnp.stack(x), s)
    return jnp.stack(logits), jnp.stack(rows)


@pytest.mark.parity("bahdanau", "a loop over appendix A")
def test_logits_weights_and_every_gradient_are_those_of_appendix_a_by_hand():
    params = params_of(MODEL)
    rows = [2, 3]  # of 4 and 6 source words, and 1 and 3 target words
    weights = alignments(MODEL, params, SOURCE, TOKENS, SOURCE_MASK, MASK)

    def expected(params):
        results = [
            by_hand(params, SOURCE[r, : SOURCE_LENGTHS[r]], TOKENS[r, : LENGTHS[r]]) for r in rows
        ]
        return sum(jnp.sum(jnp.sin(logits)) for logits, _ in results), results

    def ours(params):
        logits = MODEL.apply({"params": params}, SOURCE, TOKENS, SOURCE_MASK, MASK)
        kept = MASK[..., None] & jnp.asarray([False, False, True, True])[:, None, None]
        return jnp.sum(jnp.where(kept, jnp.sin(logits), 0.0)), logits

    gradient, logits = jax.jit(jax.grad(ours, has_aux=True))(params)
    expected_gradient, results = jax.jit(jax.grad(expected, has_aux=True))(params)
    for row, (their_logits, their_weights) in zip(rows, results, strict=True):
        length, source_length = LENGTHS[row], SOURCE_LENGTHS[row]
        assert_same(logits[row, :length], their_logits)
        assert_same(weights[row, :length, :source_length], their_weights)
    assert_gradients(gradient, expected_gradient)


def test_scores_are_the_alignment_model_in_float64():
    rng = np.random.default_rng(0)
    query, keys, vector = (rng.standard_normal(shape) for shape in ((3, 6), (3, 5, 6), (6,)))
    expected = np.einsum("bsk,k->bs", np.tanh(query[:, None] + keys), vector)
    arguments = (jnp.asarray(x, jnp.float32) for x in (query, keys, vector))
    assert_same(additive_scores(*arguments), expected)


def test_weights_are_a_distribution_over_the_real_source_and_exactly_zero_on_padding():
    weights = alignments(MODEL, params_of(MODEL), SOURCE, TOKENS, SOURCE_MASK, MASK)
    assert weights.shape == (*TOKENS.shape, SOURCE.shape[1])
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=0, atol=1e-6)
    real = np.broadcast_to(np.asarray(SOURCE_MASK)[:, None], weights.shape)
    assert (np.asarray(weights)[real] > 0).all() and (np.asarray(weights)[~real] == 0).all()


def test_a_row_that_may_look_at_nothing_looks_at_nothing():
    visible = jnp.asarray([[True, False, True], [False, False, False]])

    def total(scores):
        return jnp.sum(jnp.square(alignment(scores, visible)))

    scores = jnp.asarray([[1e4, 0.0, 1e4], [1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(alignment(scores, visible), [[0.5, 0, 0.5], [0, 0, 0]])
    assert np.isfinite(jax.grad(total)(scores)).all()


def test_untrained_it_looks_at_all_source_words_alike():
    # v_a starts at zero (appendix B.1), so all scores are.
    params = nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), SOURCE, TOKENS)["params"])
    weights = alignments(MODEL, params, SOURCE, TOKENS, SOURCE_MASK)
    expected = np.asarray(SOURCE_MASK) / SOURCE_LENGTHS[:, None]
    expected = np.broadcast_to(expected[:, None], weights.shape)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_the_paper_s_size_has_the_parameters_of_its_matrices():
    # Appendix A.2.3: m = 620, n = n' = 1000, l = 500; 30 000 words.
    m, n, out, vocab = 620, 1000, 1000, 30_000
    units = 3 * (2 * (m + n + 1) * n + (m + n + 2 * n + 1) * n)  # encoder twice, decoder
    align = n * n + 2 * n * n + n + n
    matrices = units + (n + 1) * n + align + (n + m + 2 * n + 1) * out
    counts = bahdanau.num_params(bahdanau.rnnsearch())
    assert counts["non_embedding"] == matrices
    assert counts["total"] == matrices + 2 * vocab * m + vocab * 500


def test_decoding_token_by_token_is_the_whole():
    translation.check_decoding_token_by_token(MODEL)


def test_prompts_of_unequal_length_go_on_each_from_its_last_token():
    translation.check_prompts_of_unequal_length(MODEL)


def test_padded_rows_and_their_gradients_are_those_of_each_row_alone():
    translation.check_rows_are_as_they_are_alone(MODEL)


def test_ids_of_padding_are_not_seen():
    translation.check_ids_of_padding_are_not_seen(MODEL)


def test_where_the_source_is_padded_does_not_matter():
    translation.check_source_padded_on_the_left_is_that_on_the_right(MODEL)


def test_no_token_sees_its_future():
    translation.check_no_token_sees_its_future(MODEL)


def test_every_source_token_is_seen():
    translation.check_every_real_source_token_is_seen(MODEL)


def test_half_precision_gives_float32_logits():
    half = Bahdanau(dataclasses.replace(TINY, dtype="bfloat16"))
    translation.check_half_precision_gives_float32_logits_near_those_of_float32(MODEL, half)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(embed_dim=0), "embed_dim must be at least 1, got 0"),
        (dict(hidden_dim=-1), "hidden_dim must be at least 1, got -1"),
        (dict(alignment_dim=0), "alignment_dim must be at least 1, got 0"),
        (dict(maxout_dim=0), "maxout_dim must be at least 1, got 0"),
        (dict(source_vocab_size=0), "source_vocab_size must be at least 1, got 0"),
        (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(TINY, **wrong)
