"""The LSTM encoder-decoder is the paper's: its size, its start, and one vector between the two."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lineage_jax.models import seq2seq
from lineage_jax.models.seq2seq import Seq2Seq, Seq2SeqConfig
from tests.models import translation
from tests.models.translation import SOURCE, SOURCE_MASK, TOKENS, call, params_of, start

TINY = Seq2SeqConfig(num_layers=2, embed_dim=5, hidden_dim=7, source_vocab_size=23, vocab_size=19)
MODEL = Seq2Seq(TINY)


def test_the_paper_s_size_has_384_million_parameters_of_which_64_are_recurrent():
    # Section 3.4. It counts no biases: 2 x 4 layers x 4 gates x 1000 of them.
    counts = seq2seq.num_params(seq2seq.seq2seq_2014())
    assert counts["total"] == 384_000_000 + 32_000
    assert counts["non_embedding"] == 64_000_000 + 32_000


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
    half = Seq2Seq(dataclasses.replace(TINY, dtype="bfloat16"))
    translation.check_half_precision_gives_float32_logits_near_those_of_float32(MODEL, half)


def test_all_that_passes_from_the_source_is_the_state_of_each_layer_whatever_its_length():
    # 2 layers x 2 vectors x 7 units a sentence: section 1's vector of fixed dimensionality.
    for length in (1, 7):
        cache = start(MODEL, params_of(MODEL), SOURCE[:, :length])
        assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [(4, 7)] * 4


def test_parameters_start_uniform_within_the_scale():
    config = dataclasses.replace(TINY, embed_dim=40, hidden_dim=40)
    params = nn.unbox(jax.jit(Seq2Seq(config).init)(jax.random.key(0), SOURCE, TOKENS)["params"])
    everything = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    assert np.abs(everything).max() <= 0.08
    # Its standard deviation is 0.08 / sqrt(3), within five of its own deviations.
    spread = 5 * math.sqrt((1 / 5 - 1 / 9) / everything.size) * 9 / 6
    assert everything.std() / (0.08 / math.sqrt(3)) == pytest.approx(1, abs=spread)


def test_the_first_loss_is_that_of_a_uniform_guess():
    params = nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), SOURCE, TOKENS)["params"])
    logits = call(MODEL, params, SOURCE, TOKENS, SOURCE_MASK)
    # States are below 1 and the head's entries below 0.08: no logit is beyond 7 x 0.08, and the
    # probabilities are within that factor, twice, of even.
    entropy = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
    assert (jnp.abs(entropy - np.log(19)) < 2 * 7 * 0.08).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(embed_dim=-2), "embed_dim must be at least 1, got -2"),
        (dict(hidden_dim=0), "hidden_dim must be at least 1, got 0"),
        (dict(source_vocab_size=0), "source_vocab_size must be at least 1, got 0"),
        (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (dict(init_scale=0.0), "init_scale must be more than 0, got 0.0"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(TINY, **wrong)
