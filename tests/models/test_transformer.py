"""The Transformer is the paper's: sizes, tables, positions, padding, cache and refusals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lineage_jax.models import transformer
from lineage_jax.models.transformer import StackConfig, Transformer, TransformerConfig
from lineage_jax.nn import sinusoids
from tests.models import translation
from tests.models.translation import SOURCE, SOURCE_MASK, TOKENS, call, params_of

TINY = TransformerConfig(
    encoder=StackConfig(num_layers=1, num_heads=3, mlp_dim=11),
    decoder=StackConfig(num_layers=2, num_heads=5, mlp_dim=7),
    embed_dim=15,
    source_vocab_size=23,
    vocab_size=19,
    max_len=8,
    shared_embeddings=False,
)
MODEL = Transformer(TINY)
ONE = dataclasses.replace(TINY, source_vocab_size=19, shared_embeddings=True)


@pytest.mark.parametrize(
    ("preset", "printed"),
    [(transformer.transformer_base, 65e6), (transformer.transformer_big, 213e6)],
)
def test_the_paper_s_sizes_have_about_the_printed_number_of_parameters(preset, printed):
    # By hand: a block has 4 D^2 weights an attention and 2 D F, and as many biases and norms.
    c = preset()
    d, f, layers = c.embed_dim, c.encoder.mlp_dim, 6
    attention, mlp, norm = 4 * (d * d + d), 2 * d * f + f + d, 2 * d
    blocks = layers * ((attention + mlp + 2 * norm) + (2 * attention + mlp + 3 * norm))
    counts = transformer.num_params(c)
    assert counts["non_embedding"] == blocks
    assert counts["total"] == blocks + 37_000 * d
    assert abs(counts["total"] / printed - 1) < 0.03


def test_decoding_token_by_token_is_the_whole():
    translation.check_decoding_token_by_token(MODEL)


def test_prompts_of_unequal_length_go_on_each_from_its_last_token():
    translation.check_prompts_of_unequal_length(MODEL)


def test_padded_rows_and_their_gradients_are_those_of_each_row_alone():
    translation.check_rows_are_as_they_are_alone(MODEL)


def test_ids_of_padding_are_not_seen():
    translation.check_ids_of_padding_are_not_seen(MODEL)


def test_no_token_sees_its_future():
    translation.check_no_token_sees_its_future(MODEL)


def test_every_source_token_is_seen():
    translation.check_every_real_source_token_is_seen(MODEL)


def test_half_precision_gives_float32_logits():
    half = Transformer(dataclasses.replace(TINY, dtype="bfloat16"))
    translation.check_half_precision_gives_float32_logits_near_those_of_float32(MODEL, half)


def test_without_positions_the_order_of_the_source_would_be_lost(monkeypatch):
    def reordered():
        run = jax.jit(lambda source: MODEL.apply({"params": params_of(MODEL)}, source, TOKENS))
        return [np.asarray(run(source)) for source in (SOURCE, SOURCE[:, ::-1])]

    there, back = reordered()
    assert np.abs(there - back).max() > 0.1
    zeros = lambda positions, width: jnp.zeros((*positions.shape, width))  # noqa: E731
    monkeypatch.setattr(transformer, "sinusoids", zeros)
    there, back = reordered()
    np.testing.assert_allclose(there, back, rtol=0, atol=1e-5)


def test_one_table_is_both_languages_and_the_scores():
    params = params_of(Transformer(ONE))
    assert "embed" in params and not {"source_embed", "head"} & set(params)
    apart = dataclasses.replace(ONE, shared_embeddings=False, tied_embeddings=False)
    table = params["embed"]
    copied = {**params, "source_embed": table, "head": table}
    source = jnp.minimum(SOURCE, 18)
    found = call(Transformer(apart), copied, source, TOKENS, SOURCE_MASK)
    expected = call(Transformer(ONE), params, source, TOKENS, SOURCE_MASK)
    np.testing.assert_array_equal(found, expected)


def test_attention_to_the_source_sums_to_one_and_never_touches_padding():
    _, found = MODEL.apply(
        {"params": params_of(MODEL)}, SOURCE, TOKENS, SOURCE_MASK, mutable=["intermediates"]
    )
    (weights,) = found["intermediates"]["decoder"]["blocks"]["cross_attention"]["weights"]
    assert weights.shape == (2, 4, 5, 6, 7)  # L B H T S
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    padding = np.broadcast_to(~np.asarray(SOURCE_MASK)[None, :, None, None], weights.shape)
    assert (weights[padding] == 0).all()


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoids_are_those_of_section_3_5_with_sines_first(width):
    positions = np.asarray([[0, 1, 5, 300]])
    paper = np.zeros((1, 4, width))
    for i in range(width):
        angle = positions / 10_000 ** (2 * (i // 2) / width)
        paper[..., i] = np.sin(angle) if i % 2 == 0 else np.cos(angle)
    order = [*range(0, width, 2), *range(1, width, 2)]
    found = sinusoids(jnp.asarray(positions), width)
    # An angle of 300 is rounded to 2^-16 of a radian.
    np.testing.assert_allclose(found, paper[..., order], rtol=0, atol=2**-15)


def test_a_shift_of_positions_is_a_linear_map():
    """Section 3.5: PE(p + k) is a linear function of PE(p)."""
    index = jnp.arange(20)[None]
    here, there = (np.asarray(sinusoids(index + k, 8)[0], np.float64) for k in (0, 3))
    shift, *_ = np.linalg.lstsq(here, there, rcond=None)
    np.testing.assert_allclose(here @ shift, there, rtol=0, atol=1e-5)


def test_the_tables_start_at_unit_variance_once_scaled():
    config = dataclasses.replace(ONE, embed_dim=45)
    init = jax.jit(Transformer(config).init)
    table = nn.unbox(init(jax.random.key(0), SOURCE % 19, TOKENS)["params"])["embed"]["table"]
    assert float(table.std()) * math.sqrt(45) == pytest.approx(1, abs=5 / math.sqrt(2 * table.size))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(embed_dim=16), "encoder.num_heads=3 must divide embed_dim=16"),
        (dict(shared_embeddings=True), "shared_embeddings need one vocabulary, got source_vocab"),
        (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (dict(dropout_rate=1.0), r"dropout_rate must be in \[0, 1\), got 1.0"),
        (
            dict(decoder=StackConfig(num_layers=0, num_heads=5, mlp_dim=7)),
            "decoder.num_layers must be at least 1, got 0",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_sentences_longer_than_the_positions_are_refused():
    long = jnp.zeros((1, 9), jnp.int32)
    with pytest.raises(ValueError, match="at most max_len=8 tokens of the source, got 9"):
        call(MODEL, params_of(MODEL), long, TOKENS[:1])
    with pytest.raises(ValueError, match="at most max_len=8 tokens a sequence, got 9"):
        call(MODEL, params_of(MODEL), SOURCE[:1], long)
