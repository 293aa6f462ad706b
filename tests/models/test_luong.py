"""Luong's translators are their equations: scores, windows, and what a step tells the next."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lineage_jax.models import luong
from lineage_jax.models.luong import (
    Luong,
    LuongConfig,
    local_weights,
    location_scores,
    predicted_place,
)
from tests.models import translation
from tests.models.translation import (
    MASK,
    POSITIONS,
    SOURCE,
    SOURCE_LENGTHS,
    SOURCE_MASK,
    TOKENS,
    alignments,
    assert_gradients,
    call,
    decode,
    params_of,
    start,
)
from tests.nn.closeness import assert_same

# Windows that are narrower than the sentences; embeddings and states of unlike width.
TINY = LuongConfig(
    num_layers=2, embed_dim=5, hidden_dim=7, source_vocab_size=23, vocab_size=19, window=2
)
KINDS = {
    "dot": dict(score="dot"),
    "general": dict(score="general"),
    "concat": dict(score="concat"),
    "location": dict(score="location", max_source_len=5),
    "local_m": dict(score="dot", alignment="local_m"),
    "local_p": dict(score="general", alignment="local_p"),
    "not_fed": dict(score="general", input_feeding=False),
}
MODELS = {kind: Luong(dataclasses.replace(TINY, **changes)) for kind, changes in KINDS.items()}
each_kind = pytest.mark.parametrize("kind", KINDS)
# One of each code path: the properties that all keep, where each costs a compilation or more.
each_path = pytest.mark.parametrize("kind", ["concat", "location", "local_p"])


def cell(params, x, state):
    """Graves 2013, equations 7 to 11 without peepholes, for one word."""
    h, c = state
    i, f, g, o = (
        x @ params["kernel"][:, k] + h @ params["recurrent"][:, k] + params["bias"][k]
        for k in range(4)
    )
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def deep(params, x, states):
    """All layers for one word: the output of the top one, and the states."""
    after = []
    for layer, state in enumerate(states):
        after.append(cell(params[f"layer_{layer}"], x, state))
        x = after[-1][0]
    return x, after


def score_by_hand(config, w, h, outputs):
    """Section 3.1: each source word's score, as far as it has one."""
    if config.score == "dot":
        return [h @ source for source in outputs]
    if config.score == "general":
        return [(source @ w["key"]) @ h for source in outputs]
    if config.score == "concat":
        both = jnp.concatenate([w["query"], w["key"]])  # W_a of [h_t; h_s]
        return [jnp.tanh(jnp.concatenate([h, s]) @ both) @ w["vector"] for s in outputs]
    return [h @ w["location"][:, place] for place in range(len(outputs))][: config.max_source_len]


def weights_by_hand(config, w, h, outputs, t):
    """Equations 7 to 10; zero outside of the window."""
    scores = score_by_hand(config, w, h, outputs)
    places = range(len(scores))
    if config.alignment == "global":
        weights = jnp.exp(jnp.stack(scores))
        weights = weights / weights.sum()
    else:
        centre = float(t)
        if config.alignment == "local_p":
            inner = jnp.tanh(h @ w["predict"]) @ w["predict_vector"]
            centre = len(outputs) / (1 + jnp.exp(-inner))
        inside = [jnp.abs(place - centre) <= config.window for place in places]
        weights = jnp.stack(
            [jnp.where(near, jnp.exp(one), 0) for near, one in zip(inside, scores, strict=True)]
        )
        weights = weights / jnp.maximum(weights.sum(), 1e-30)
        if config.alignment == "local_p":
            sigma = config.window / 2
            square = jnp.stack([(place - centre) ** 2 for place in places])
            weights = weights * jnp.exp(-square / (2 * sigma**2))
    return jnp.concatenate([weights, jnp.zeros(len(outputs) - len(scores))])


def by_hand(config, params, source, tokens):
    """Section 3, one sentence and one word at a time: logits [T, V] and weights [T, S]."""
    zeros = jnp.zeros(config.hidden_dim)
    states, outputs = [(zeros, zeros)] * config.num_layers, []
    for i in source:
        output, states = deep(params["encoder"], params["source_embed"]["table"][i], states)
        outputs.append(output)
    w, attentional, logits, rows = params["attention"], zeros, [], []
    for t, y in enumerate(tokens):
        x = params["embed"]["table"][y]
        if config.input_feeding:
            x = jnp.concatenate([x, attentional])
        h, states = deep(params["decoder"], x, states)
        weights = weights_by_hand(config, w, h, outputs, t)
        context = sum(one * output for one, output in zip(weights, outputs, strict=True))
        attentional = jnp.tanh(jnp.concatenate([context, h]) @ w["combine"])
        logits.append(params["head"]["table"] @ attentional)
        rows.append(weights)
    return jnp.stack(logits), jnp.stack(rows)


@pytest.mark.parity("luong", "a loop over section 3")
@each_kind
def test_logits_weights_and_every_gradient_are_those_of_section_3_by_hand(kind):
    # A source longer than the windows; two words, as the second one reads what the first saw.
    model, params, row, length = MODELS[kind], params_of(MODELS[kind]), 3, 2
    source_length = SOURCE_LENGTHS[row]
    source, tokens = SOURCE[row, :source_length], TOKENS[row, :length]

    def expected(params):
        logits, weights = by_hand(model.config, params, source, tokens)
        return jnp.sum(jnp.sin(logits)), (logits, weights)

    def ours(params):
        inputs = (SOURCE, TOKENS, SOURCE_MASK, MASK)
        logits, sown = model.apply({"params": params}, *inputs, mutable="intermediates")
        logits, weights = logits[row, :length], sown["intermediates"]["alignment"][0][row]
        return jnp.sum(jnp.sin(logits)), (logits, weights[:length, :source_length])

    gradient, found = jax.jit(jax.grad(ours, has_aux=True))(params)
    expected_gradient, wanted = jax.jit(jax.grad(expected, has_aux=True))(params)
    assert_same(found, wanted)
    assert_gradients(gradient, expected_gradient)


@pytest.mark.parametrize("kind", ["dot", "general", "concat", "location", "local_m"])
def test_weights_are_a_distribution_over_the_real_source_and_exactly_zero_on_padding(kind):
    weights = alignments(MODELS[kind], params_of(MODELS[kind]), SOURCE, TOKENS, SOURCE_MASK, MASK)
    visible = np.broadcast_to(np.asarray(SOURCE_MASK)[:, None], weights.shape)
    if kind == "location":
        visible = visible & (np.arange(7) < 5)
    if kind == "local_m":  # [t - D, t + D]
        visible = visible & (np.abs(np.arange(7) - np.arange(6)[:, None]) <= 2)
    weights = np.asarray(weights)
    assert (weights[visible] > 0).all() and (weights[~visible] == 0).all()
    # All but steps whose window lies behind the end of their source.
    np.testing.assert_allclose(weights.sum(-1), visible.any(-1), rtol=0, atol=1e-6)
    assert visible.any(-1).all() == (kind != "local_m")


def test_predicted_windows_are_zero_outside_and_sum_to_less_than_one():
    model, params = MODELS["local_p"], params_of(MODELS["local_p"])
    weights = np.asarray(alignments(model, params, SOURCE, TOKENS, SOURCE_MASK, MASK))
    real = np.broadcast_to(np.asarray(SOURCE_MASK)[:, None], weights.shape)
    assert (weights[~real] == 0).all() and (weights >= 0).all()
    sums = weights.sum(-1)
    assert (sums > 0).all() and (sums <= 1).all() and (sums < 0.99).any()
    seen = [np.flatnonzero(row) for row in weights.reshape(-1, weights.shape[-1]) if row.any()]
    assert max(places.max() - places.min() for places in seen) <= 2 * TINY.window
    assert any(len(places) < 7 for places in seen)


def test_the_gaussian_of_local_p_has_a_deviation_of_half_the_window():
    # Equal scores: what is left of equation 10 is its Gaussian, up to one constant a row.
    centre, window = jnp.asarray([4.0, 2.5, 0.0]), 3
    scores, mask = jnp.zeros((3, 9)), jnp.ones((3, 9), bool)
    weights = np.asarray(local_weights(scores, centre, mask, window, gaussian=True))
    flat = np.asarray(local_weights(scores, centre, mask, window, gaussian=False))
    distance = np.arange(9) - np.asarray(centre)[:, None]
    inside = np.abs(distance) <= window
    np.testing.assert_array_equal(flat > 0, inside)
    np.testing.assert_array_equal(weights > 0, inside)
    counts = np.broadcast_to(inside.sum(-1, keepdims=True), inside.shape)
    np.testing.assert_allclose(flat[inside], 1 / counts[inside], rtol=1e-6)
    sigma = 3 / 2
    expected = np.exp(-(distance**2) / (2 * sigma**2)) / counts
    np.testing.assert_allclose(weights[inside], expected[inside], rtol=1e-6)


def test_predicted_places_are_shares_of_each_row_s_own_length():
    rng = np.random.default_rng(0)
    hidden, predict, vector = (rng.standard_normal(shape) for shape in ((4, 7), (7, 7), (7,)))
    expected = SOURCE_LENGTHS / (1 + np.exp(-np.tanh(hidden @ predict) @ vector))
    arguments = (jnp.asarray(x, jnp.float32) for x in (hidden, predict, vector))
    assert_same(predicted_place(*arguments, SOURCE_MASK), expected)


def test_location_scores_know_a_word_by_its_place_and_end_with_their_length():
    by_place = jnp.asarray([[3.0, 5.0, 7.0]])
    mask = jnp.asarray([[False, True, True, False, True, True]])
    scores, visible = location_scores(by_place, mask)
    np.testing.assert_array_equal(visible, [[False, True, True, False, True, False]])
    np.testing.assert_array_equal(scores[visible], [3.0, 5.0, 7.0])


@pytest.mark.parametrize(("kind", "fed"), [("general", True), ("not_fed", False)])
def test_what_was_attended_to_reaches_the_next_step_where_input_is_fed(kind, fed):
    model, params = MODELS[kind], params_of(MODELS[kind])
    cache = start(model, params, SOURCE, SOURCE_MASK)
    other = cache._replace(attentional=cache.attentional + 0.5)
    one, _ = decode(model, params, TOKENS[:, :1], POSITIONS[:, :1], cache)
    two, _ = decode(model, params, TOKENS[:, :1], POSITIONS[:, :1], other)
    assert (one != two).any(-1).all() == fed
    assert (one == two).all() != fed


def test_dropout_spares_what_goes_from_step_to_step():
    model = Luong(dataclasses.replace(TINY, dropout_rate=0.5, input_feeding=False))
    params = params_of(model)

    @jax.jit
    def run(params, key):
        inputs = (SOURCE, TOKENS, SOURCE_MASK, MASK)
        return model.apply(
            {"params": params}, *inputs, True, rngs={"dropout": key}, mutable="intermediates"
        )

    one, two = (run(params, jax.random.key(seed))[0] for seed in (0, 1))
    assert (one != two).any(-1)[MASK].all()
    # Layers that are deaf to their inputs have nothing left to drop but their states.
    deaf = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "kernel" else leaf, params
    )
    one, two = (run(deaf, jax.random.key(seed))[1] for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_dropout_keeps_the_mean_of_what_a_layer_reads():
    # One layer whose gates are nearly linear in its input: over many draws, the logits average to
    # those without dropout.
    config = dataclasses.replace(TINY, num_layers=1, dropout_rate=0.5)
    params = jax.tree.map(lambda leaf: 0.1 * leaf, params_of(Luong(config)))
    inputs = (SOURCE[:1], TOKENS[:1, :2])

    @jax.jit
    def mean(key):
        def one(key):
            model = Luong(config)
            return model.apply({"params": params}, *inputs, train=True, rngs={"dropout": key})

        draws = jax.vmap(one)(jax.random.split(key, 2000))
        return draws.mean(0), draws.std(0)

    average, spread = mean(jax.random.key(0))
    expected = call(Luong(config), params, *inputs)
    error = np.abs(average - expected) / (spread / 2000**0.5)
    assert (error < 5).all() and (spread > 0).all()  # five deviations of the mean


def test_the_paper_s_size_has_the_parameters_of_its_matrices():
    # Section 4.1: 4 layers, 1000 cells, 1000-dimensional embeddings, 50 000 words; biases besides.
    n, vocab = 1000, 50_000
    lstms = 2 * 4 * (2 * n * 4 * n + 4 * n) + n * 4 * n  # the last: what is fed
    shared = lstms + 2 * n * n  # W_c
    local, location = (luong.num_params(size()) for size in (luong.luong_local, luong.luong_global))
    assert local["non_embedding"] == shared + n * n + n * n + n  # W_a, W_p and v_p
    assert location["non_embedding"] == shared + 50 * n
    assert local["total"] - local["non_embedding"] == 3 * vocab * n


def test_parameters_start_uniform_within_the_scale():
    config = dataclasses.replace(TINY, score="concat", alignment="local_p", hidden_dim=40)
    init = jax.jit(Luong(config).init)
    params = nn.unbox(init(jax.random.key(0), SOURCE, TOKENS)["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert 0.05 < np.abs(leaf).max() <= 0.1, path  # of 40 draws and more, one beyond half-way


@each_kind
def test_decoding_token_by_token_is_the_whole(kind):
    translation.check_decoding_token_by_token(MODELS[kind])


@each_path
def test_prompts_of_unequal_length_go_on_each_from_its_last_token(kind):
    translation.check_prompts_of_unequal_length(MODELS[kind])


@each_path
def test_padded_rows_and_their_gradients_are_those_of_each_row_alone(kind):
    translation.check_rows_are_as_they_are_alone(MODELS[kind])


@each_path
def test_ids_of_padding_are_not_seen(kind):
    translation.check_ids_of_padding_are_not_seen(MODELS[kind])


@each_path
def test_where_the_source_is_padded_does_not_matter(kind):
    translation.check_source_padded_on_the_left_is_that_on_the_right(MODELS[kind])


@each_kind
def test_no_token_sees_its_future(kind):
    translation.check_no_token_sees_its_future(MODELS[kind])


@each_path
def test_every_source_token_is_seen(kind):
    translation.check_every_real_source_token_is_seen(MODELS[kind])


def test_half_precision_gives_float32_logits():
    half = Luong(dataclasses.replace(TINY, dtype="bfloat16"))
    translation.check_half_precision_gives_float32_logits_near_those_of_float32(Luong(TINY), half)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(window=0), "window must be at least 1, got 0"),
        (
            dict(score="location", alignment="local_m", max_source_len=9),
            "score='location' is global, got alignment='local_m'",
        ),
        (
            dict(score="location"),
            "score='location' needs a max_source_len of at least 1, got None",
        ),
        (dict(dropout_rate=1.0), r"dropout_rate must be in \[0, 1\), got 1.0"),
        (dict(init_scale=-1.0), "init_scale must be more than 0, got -1.0"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(TINY, **wrong)
