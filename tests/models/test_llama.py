"""LLaMA is the model of its papers: sizes, causality, positions, documents, cache and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lineage_jax.models import llama
from lineage_jax.models.llama import Llama, LlamaConfig

# Heads that are wider together than the residual stream; nothing divides the vocabulary.
TINY = LlamaConfig(
    num_layers=3,
    embed_dim=30,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=37,
    vocab_size=67,
    max_len=16,
)
LENGTH = 12


@pytest.fixture(scope="module")
def params():
    """Every parameter random: ones would hide mistakes."""
    shapes = jax.eval_shape(Llama(TINY).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        meta.unbox(shapes["params"]),
    )


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 67, (3, LENGTH)), jnp.int32)


@jax.jit
def forward(params, tokens, positions=None, segment_ids=None, cache=None):
    return Llama(TINY).apply({"params": params}, tokens, positions, segment_ids, cache)


@pytest.mark.parametrize(
    ("preset", "count", "printed"),
    [
        # As released, and as the papers print it.
        (llama.llama_7b, 6_738_415_616, 6.7e9),
        (llama.llama_13b, 13_015_864_320, 13.0e9),
        (llama.llama_33b, 32_528_943_616, 32.5e9),
        (llama.llama_65b, 65_285_660_672, 65.2e9),
        (llama.llama2_70b, 68_976_648_192, 70e9),
    ],
)
def test_each_size_has_as_many_parameters_as_were_released(preset, count, printed):
    found = llama.num_params(preset())["total"]
    assert found == count
    assert abs(found / printed - 1) < 0.015


def test_feed_forward_widths_are_those_of_the_released_models():
    presets = (llama.llama_7b, llama.llama_13b, llama.llama_33b, llama.llama_65b)
    assert [preset().mlp_dim for preset in presets] == [11_008, 13_824, 17_920, 22_016]


def test_tied_embeddings_save_the_table_of_the_head():
    table = TINY.vocab_size * TINY.embed_dim
    two = llama.num_params(TINY)
    one = llama.num_params(dataclasses.replace(TINY, tied_embeddings=True))
    assert two["total"] - one["total"] == table
    assert two["total"] - 2 * table == two["non_embedding"] == one["non_embedding"]


def test_no_parameter_is_a_bias(params):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert not [path for path in paths if "bias" in path or "positions" in path]


@pytest.mark.parametrize("changed", range(LENGTH))
def test_no_position_sees_its_future(params, tokens, changed):
    before, _ = forward(params, tokens)
    after, _ = forward(params, tokens.at[:, changed].set((tokens[:, changed] + 1) % 67))
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed] != after[:, changed]).any(-1).all()


def test_a_sequence_is_scored_alike_wherever_it_begins(params, tokens):
    # Positions act through their differences alone, so no table ends at max_len either.
    index = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    expected, _ = forward(params, tokens)
    for first in (1, 4, 40):
        found, _ = forward(params, tokens, first + index)
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)
    spread, _ = forward(params, tokens, 2 * index)
    assert float(jnp.abs(spread - expected).max()) > 1e-2


def test_a_packed_document_is_scored_as_if_it_were_alone(params, tokens):
    sizes = (4, 1, 7)
    segment_ids = jnp.asarray(np.repeat([7, 2, 5], sizes))[None]  # any ids, in any order
    positions = jnp.concatenate([jnp.arange(size) for size in sizes])[None]
    packed, _ = forward(params, tokens[:1], positions, segment_ids)
    first = 0
    for size in sizes:
        alone = tokens[:1].at[:, :size].set(tokens[:1, first : first + size])
        expected, _ = forward(params, alone)  # what follows the document is not seen
        np.testing.assert_allclose(
            packed[:, first : first + size], expected[:, :size], rtol=0, atol=1e-5
        )
        first += size


def test_cached_decoding_is_the_full_forward_pass_token_by_token(params, tokens):
    full, _ = forward(params, tokens)
    cache = llama.empty_cache(TINY, 3, LENGTH)
    for t in range(LENGTH):
        at = jnp.full((3, 1), t)
        logits, cache = forward(params, tokens[:, t : t + 1], at, None, cache)
        np.testing.assert_allclose(logits[:, 0], full[:, t], rtol=0, atol=1e-5)


def test_prompts_of_unequal_length_go_on_each_at_its_own_position(params, tokens):
    lengths = jnp.asarray([2, 7, 4])
    full, _ = forward(params, tokens)
    padding = jnp.arange(8)[None] >= lengths[:, None]
    prompt = jnp.where(padding, 66, tokens[:, :8])  # padded on the right with any id
    positions = jnp.broadcast_to(jnp.arange(8), prompt.shape)
    logits, cache = forward(params, prompt, positions, None, llama.empty_cache(TINY, 3, LENGTH))
    np.testing.assert_allclose(logits[~padding], full[:, :8][~padding], rtol=0, atol=1e-5)
    at = lengths[:, None]
    following = jnp.take_along_axis(tokens, at, axis=1)
    logits, _ = forward(params, following, at, None, cache)
    expected = jnp.take_along_axis(full, at[..., None], axis=1)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
def test_the_cache_shrinks_by_heads_over_key_value_heads(num_kv_heads):
    def num_bytes(config):
        shapes = jax.eval_shape(lambda: llama.empty_cache(config, 2, 8))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    whole = num_bytes(dataclasses.replace(TINY, num_kv_heads=6))
    grouped = num_bytes(dataclasses.replace(TINY, num_kv_heads=num_kv_heads))
    assert whole * num_kv_heads == grouped * 6


def test_llama_2_keeps_an_eighth_of_the_keys_and_values():
    config = llama.llama2_70b()
    shapes = jax.eval_shape(lambda: llama.empty_cache(config, 1, 4096))
    held = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert held * 8 == 2 * config.num_layers * 4096 * config.embed_dim


def test_shared_keys_and_values_are_whole_ones_that_are_equal(params, tokens):
    def repeated(path, leaf):
        name = jax.tree_util.keystr(path)
        return jnp.repeat(leaf, 3, axis=2) if "key" in name or "value" in name else leaf

    whole = dataclasses.replace(TINY, num_kv_heads=6)
    copied = jax.tree_util.tree_map_with_path(repeated, params)
    found, _ = jax.jit(Llama(whole).apply)({"params": copied}, tokens)
    expected, _ = forward(params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_first_loss_is_that_of_a_uniform_guess(tokens):
    params = jax.jit(Llama(TINY).init)(jax.random.key(0), tokens)["params"]
    logits, _ = forward(meta.unbox(params), tokens)
    entropy = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
    # Logits of variance s^2 = 30 x 0.02^2 add s^2 / 2, give or take five standard deviations of
    # the variance of 67 of them: 5 x s^2 / 2 x sqrt(2 / 66).
    s2 = 30 * 0.02**2
    np.testing.assert_allclose(
        entropy - s2 / 2, np.log(67), rtol=0, atol=2.5 * s2 * (2 / 66) ** 0.5
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_heads=7, head_dim=None), "num_heads=7 must divide embed_dim=30, or head_dim be"),
        (dict(num_kv_heads=4), "num_kv_heads=4 must divide num_heads=6"),
        (dict(head_dim=7), "head_dim must be even, as pairs turn, got 7"),
        (dict(head_dim=None), "head_dim must be even, as pairs turn, got 5"),
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(num_kv_heads=0), "num_kv_heads must be at least 1, got 0"),
        (dict(mlp_dim=0), "mlp_dim must be at least 1, got 0"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_a_sequence_longer_than_its_context_is_refused(params):
    with pytest.raises(ValueError, match="at most max_len=16 tokens a sequence, got 17"):
        forward(params, jnp.zeros((1, 17), jnp.int32))


def test_a_cache_without_positions_or_with_packed_documents_is_refused(params, tokens):
    cache, index = llama.empty_cache(TINY, 3, LENGTH), jnp.zeros_like(tokens)
    for positions, segment_ids in ((None, None), (index, index)):
        with pytest.raises(ValueError, match="a cache needs the positions to write to"):
            forward(params, tokens, positions, segment_ids, cache)
