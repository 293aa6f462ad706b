"""GPT is the model of its papers: its sizes, causality, documents, windows, cache and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lineage_jax.models import gpt
from lineage_jax.models.gpt import GPT, GPTConfig
from lineage_jax.nn import Mask

# Three layers, so that a local one lies between two that are not; nothing divides the vocabulary.
TINY = GPTConfig(
    num_layers=3, embed_dim=30, num_heads=5, vocab_size=67, max_len=16, mlp_dim=37, local_window=3
)
LENGTH = 12


@pytest.fixture(scope="module")
def params():
    """Every parameter random: zeros and ones would hide mistakes."""
    shapes = jax.eval_shape(GPT(TINY).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
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
    return GPT(TINY).apply({"params": params}, tokens, positions, segment_ids, cache)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        # As released: openai-gpt, gpt2, gpt2-medium, gpt2-large, gpt2-xl.
        (gpt.gpt1, 116_534_784),
        (gpt.gpt2_small, 124_439_808),
        (gpt.gpt2_medium, 354_823_168),
        (gpt.gpt2_large, 774_030_080),
        (gpt.gpt2_xl, 1_557_611_200),
    ],
)
def test_gpt1_and_gpt2_have_as_many_parameters_as_were_released(preset, count):
    assert gpt.num_params(preset())["total"] == count


@pytest.mark.parametrize(
    ("preset", "printed"),
    [
        (gpt.gpt3_125m, 125e6),
        (gpt.gpt3_1_3b, 1.3e9),
        (gpt.gpt3_6_7b, 6.7e9),
        (gpt.gpt3_13b, 13.0e9),
        (gpt.gpt3_175b, 175.0e9),
    ],
)
def test_gpt3_has_as_many_parameters_as_its_table_prints(preset, printed):
    count = gpt.num_params(preset())["total"]
    assert abs(count / printed - 1) < 0.015, f"{count:,}"  # the table has two or three digits


def test_parameters_without_tables_are_12_per_layer_and_squared_width():
    # Kaplan et al. 2020, section 2.1: 12 L d^2, biases and norms left out.
    c = gpt.gpt3_175b()
    count = gpt.num_params(c)["non_embedding"]
    assert count / (12 * c.num_layers * c.embed_dim**2) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("changed", range(LENGTH))
def test_no_position_sees_its_future(params, tokens, changed):
    before, _ = forward(params, tokens)
    after, _ = forward(params, tokens.at[:, changed].set((tokens[:, changed] + 1) % 67))
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed] != after[:, changed]).any(-1).all()


def test_the_gradient_with_respect_to_the_future_is_exactly_zero(params, tokens):
    def score(embedded, at):
        table = {**params, "embed": {"table": embedded}}
        ids = jnp.arange(LENGTH)[None]  # each position its own row, so that each has its gradient
        logits, _ = GPT(TINY).apply({"params": table}, ids)
        return logits[0, at, LENGTH:].sum()  # of words that are not read: they only score

    gradient = jax.jit(jax.grad(score))
    for at in (0, 5, LENGTH - 1):
        rows = np.abs(gradient(params["embed"]["table"], at)[:LENGTH]).max(-1)
        assert (rows[at + 1 :] == 0).all() and (rows[: at + 1] > 0).all()


def test_a_packed_document_is_scored_as_if_it_were_alone(params, tokens):
    sizes = (4, 1, 7)
    segment_ids = jnp.asarray(np.repeat([7, 2, 5], sizes))[None]  # any ids, in any order
    positions = jnp.concatenate([jnp.arange(size) for size in sizes])[None]
    packed, _ = forward(params, tokens[:1], positions, segment_ids)
    documents = np.split(tokens[0], np.cumsum(sizes)[:-1])
    alone = tokens  # a document at the start of each row; what follows it is not seen
    for row, document in enumerate(documents):
        alone = alone.at[row, : document.size].set(document)
    alone, _ = forward(params, alone)
    together = jnp.concatenate([alone[row, :size] for row, size in enumerate(sizes)])
    np.testing.assert_allclose(packed[0], together, rtol=0, atol=1e-5)


def test_a_local_layer_reads_its_window_and_no_more(params, tokens):
    # One block of a dense model and of a local one, on the same input: what enters at `s` comes out
    # at t where 0 <= t - s < window, and nowhere else.
    block = jax.tree.map(lambda p: p[1], params["blocks"])
    index = jnp.arange(LENGTH)[None]
    shared = (index, Mask(index, index))
    x = jax.random.normal(jax.random.key(2), (1, LENGTH, TINY.embed_dim))

    @jax.jit
    def reads(window):
        def outputs(x):
            call = gpt.Block(TINY).apply
            return call({"params": block}, x, shared, (window, None))[0].sum((0, 2))

        return jnp.abs(jax.jacobian(outputs)(x)).max((1, 3))  # T, S

    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    for window in gpt.windows(TINY).tolist():
        expected = (distance >= 0) & (distance < window)
        np.testing.assert_array_equal(np.asarray(reads(window)) > 0, expected)


def test_every_second_layer_is_local():
    assert gpt.windows(TINY).tolist() == [16, 3, 16]
    assert gpt.windows(dataclasses.replace(TINY, local_window=None)).tolist() == [16, 16, 16]


def test_cached_decoding_is_the_full_forward_pass_token_by_token(params, tokens):
    full, _ = forward(params, tokens)
    cache = gpt.empty_cache(TINY, 3, LENGTH)
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
    logits, cache = forward(params, prompt, positions, None, gpt.empty_cache(TINY, 3, LENGTH))
    np.testing.assert_allclose(logits[~padding], full[:, :8][~padding], rtol=0, atol=1e-5)
    for t in range(5):
        at = (lengths + t)[:, None]
        following = jnp.take_along_axis(tokens, at, axis=1)
        logits, cache = forward(params, following, at, None, cache)
        expected = jnp.take_along_axis(full, at[..., None], axis=1)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_the_first_loss_is_that_of_a_uniform_guess(tokens):
    params = jax.jit(GPT(TINY).init)(jax.random.key(0), tokens)["params"]
    logits, _ = forward(meta.unbox(params), tokens)
    entropy = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
    # Logits of variance s^2 = 30 x 0.02^2 add s^2 / 2, give or take five standard deviations of
    # the variance of 67 of them: 5 x s^2 / 2 x sqrt(2 / 66).
    s2 = 30 * 0.02**2
    np.testing.assert_allclose(
        entropy - s2 / 2, np.log(67), rtol=0, atol=2.5 * s2 * (2 / 66) ** 0.5
    )


@pytest.mark.parametrize(("norm_first", "shrink"), [(True, 4.0), (False, 1.0)])
def test_residual_projections_start_smaller_in_gpt2(norm_first, shrink):
    # Radford et al. 2019, section 2.3: scaled by 1 / sqrt(N), N = 2 L residual layers.
    config = dataclasses.replace(TINY, num_layers=8, mlp_dim=None, norm_first=norm_first)
    index, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, TINY.embed_dim))
    inputs = x, (index, Mask(index, index)), (jnp.asarray(16), None)
    init = jax.jit(lambda key: gpt.Block(config).init(key, *inputs))
    block = meta.unbox(init(jax.random.key(0))["params"])
    attention, mlp = block["attention"], block["mlp"]
    for first, last in ((attention["query"], attention["out"]), (mlp["up"], mlp["down"])):
        assert float(first["kernel"].std()) == pytest.approx(0.02, rel=0.05)
        assert float(last["kernel"].std()) == pytest.approx(0.02 / shrink, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_heads=7), "num_heads=7 must divide embed_dim=30, or head_dim be given"),
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(vocab_size=-1), "vocab_size must be at least 1, got -1"),
        (dict(local_window=0), "local_window must be at least 1, got 0"),
        (dict(dropout_rate=1.0), r"dropout_rate must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_heads_need_not_divide_the_width_if_they_have_one():
    config = dataclasses.replace(TINY, num_heads=7, head_dim=6)
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    attention = meta.unbox(shapes)["params"]["blocks"]["attention"]
    assert attention["query"]["kernel"].shape == (3, 30, 7, 6)
    assert attention["out"]["kernel"].shape == (3, 7, 6, 30)


def test_a_sequence_longer_than_its_positions_is_refused(params):
    with pytest.raises(ValueError, match="at most max_len=16 tokens a sequence, got 17"):
        forward(params, jnp.zeros((1, 17), jnp.int32))


def test_a_cache_without_positions_or_with_packed_documents_is_refused(params, tokens):
    cache, index = gpt.empty_cache(TINY, 3, LENGTH), jnp.zeros_like(tokens)
    for positions, segment_ids in ((None, None), (index, index)):
        with pytest.raises(ValueError, match="a cache needs the positions to write to"):
            forward(params, tokens, positions, segment_ids, cache)
