"""T5 is the paper's: sizes, buckets of distances, biases, scores, padding, cache and refusals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lineage_jax.models import t5
from lineage_jax.models.t5 import T5, RelativeBias, T5Config, buckets_of_distances, relative_buckets
from lineage_jax.nn import Mask
from tests.models import translation
from tests.models.translation import MASK, SOURCE, SOURCE_MASK, TOKENS, call, params_of
from tests.nn.closeness import assert_same

# Of 7 buckets the encoder has three a side, and distances from 2 on are of one; the decoder tells
# 0, 1 and 2 apart, then 3, 4 and 5 or more.
TINY = T5Config(
    num_encoder_layers=1,
    num_decoder_layers=2,
    embed_dim=15,
    num_heads=3,
    head_dim=4,
    mlp_dim=11,
    vocab_size=23,
    num_buckets=7,
    max_distance=5,
)
MODEL = T5(TINY)
V1_1 = T5(dataclasses.replace(TINY, feed_forward="geglu", tied_embeddings=False))


@pytest.fixture(autouse=True)
def one_vocabulary(monkeypatch):
    """The target's is the source's."""
    monkeypatch.setattr(translation, "VOCAB", translation.SOURCE_VOCAB)


both = pytest.mark.parametrize("model", [MODEL, V1_1], ids=["t5", "v1_1"])


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        # As released: t5-small, t5-base, t5-large, t5-3b, t5-11b.
        (t5.t5_small, 60_506_624),
        (t5.t5_base, 222_903_552),
        (t5.t5_large, 737_668_096),
        (t5.t5_3b, 2_851_598_336),
        (t5.t5_11b, 11_307_321_344),
        # t5-v1_1-small, -base, -large, -xl, -xxl.
        (t5.t5_v1_1_small, 76_961_152),
        (t5.t5_v1_1_base, 247_577_856),
        (t5.t5_v1_1_large, 783_150_080),
        (t5.t5_v1_1_xl, 2_849_757_184),
        (t5.t5_v1_1_xxl, 11_135_332_352),
    ],
)
def test_the_sizes_have_as_many_parameters_as_were_released(preset, count):
    # By hand: a block has 4 D H K weights an attention, 2 or 3 D F, and a norm before each.
    c = preset()
    d, gates = c.embed_dim, 1 + (c.feed_forward != "relu")
    attention, mlp = 4 * d * c.num_heads * c.head_dim, (1 + gates) * d * c.mlp_dim
    blocks = c.num_encoder_layers * (3 * attention + 2 * mlp + 5 * d)
    stacks = blocks + 2 * (d + c.num_buckets * c.num_heads)
    counts = t5.num_params(c)
    assert counts["non_embedding"] == stacks
    assert counts["total"] == stacks + 32_128 * d * (1 if c.tied_embeddings else 2) == count


@both
def test_decoding_token_by_token_is_the_whole(model):
    translation.check_decoding_token_by_token(model)


def test_prompts_of_unequal_length_go_on_each_from_its_last_token():
    translation.check_prompts_of_unequal_length(MODEL)


@both
def test_padded_rows_and_their_gradients_are_those_of_each_row_alone(model):
    translation.check_rows_are_as_they_are_alone(model)


def test_ids_of_padding_are_not_seen():
    translation.check_ids_of_padding_are_not_seen(MODEL)


def test_where_the_padding_of_the_source_stands_does_not_matter():
    translation.check_source_padded_on_the_left_is_that_on_the_right(MODEL)


def test_no_token_sees_its_future():
    translation.check_no_token_sees_its_future(MODEL)


def test_every_source_token_is_seen():
    translation.check_every_real_source_token_is_seen(MODEL)


@both
def test_half_precision_gives_float32_logits(model):
    half = T5(dataclasses.replace(model.config, dtype="bfloat16"))
    translation.check_half_precision_gives_float32_logits_near_those_of_float32(model, half)


def released_bucket(after, bidirectional, num_buckets, max_distance):
    """Section 2.1's buckets as the authors' code has them, of one distance in float64."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first, distance = (num_buckets if after > 0 else 0), abs(after)
    else:
        distance = max(-after, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    grown = math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    # A logarithm on a border may be rounded to either side of it.
    return first + min(exact + math.floor(grown + 1e-9), num_buckets - 1)


SETTINGS = [(32, 128), (16, 128), (7, 5), (6, 4), (9, 100), (33, 40), (4, 3), (64, 1000)]


def buckets(bidirectional, num_buckets, max_distance, reach):
    """Of distances from -reach to reach."""
    keys = jnp.arange(-reach, reach + 1)[None]
    kinds = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    run = jax.jit(lambda q, k: relative_buckets(q, k, **kinds))
    return np.asarray(run(jnp.zeros((1, 1), jnp.int32), keys))[0, 0]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), SETTINGS)
def test_buckets_are_the_formula_s(num_buckets, max_distance, bidirectional):
    reach = 2 * max_distance
    found = buckets(bidirectional, num_buckets, max_distance, reach)
    expected = [
        released_bucket(after, bidirectional, num_buckets, max_distance)
        for after in range(-reach, reach + 1)
    ]
    assert found.tolist() == expected


@pytest.mark.oracle
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), SETTINGS)
def test_buckets_are_those_of_transformers(num_buckets, max_distance, bidirectional):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    reach = 2 * max_distance
    found = buckets(bidirectional, num_buckets, max_distance, reach)
    after = torch.arange(-reach, reach + 1)
    expected = theirs._relative_position_bucket(after, bidirectional, num_buckets, max_distance)
    assert found.tolist() == expected.tolist()


def test_the_released_buckets_are_as_section_2_1_says():
    """Of 32: logarithmic to a distance of 128, beyond which all are one."""
    found = buckets_of_distances(32, 128)
    assert found[:17] == list(range(17)) and found[-1] == 31 == max(found)
    firsts = np.asarray([found.index(bucket) for bucket in range(16, 32)])
    # Sixteen steps from 16 to 128 would each multiply the distance by 8^(1/16).
    assert np.abs(firsts - 16 * 8 ** (np.arange(16) / 16)).max() < 1
    both_sides = buckets(True, 32, 128, 300)
    assert (both_sides[: 301 - 127] == 15).all() and (both_sides[301 + 127 :] == 31).all()
    assert set(both_sides) == set(range(32)) - {16}  # no distance is nought and after the query


@pytest.mark.parametrize("causal", [True, False])
def test_the_bias_depends_on_distance_alone(causal):
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.standard_normal((7, 3)), jnp.float32)
    run = jax.jit(lambda mask: RelativeBias(TINY).apply({"params": {"table": table}}, mask))
    queries, keys = jnp.arange(9)[None], jnp.arange(11)[None]
    here = np.asarray(run(Mask(queries, keys, causal=causal)))
    assert here.shape == (1, 3, 9, 11) and here.dtype == np.float32
    np.testing.assert_array_equal(here, run(Mask(queries + 100, keys + 100, causal=causal)))
    by_distance = {}
    for t in range(9):
        for s in range(11):
            by_distance.setdefault(s - t, set()).add(tuple(here[0, :, t, s].tolist()))
    assert all(len(found) == 1 for found in by_distance.values())
    ahead = {found for after, one in by_distance.items() if after > 0 for found in one}
    behind = {found for after, one in by_distance.items() if after < 0 for found in one}
    if causal:  # nothing reads ahead, so no bucket is spent on it
        assert ahead == by_distance[0] and len(behind) == 5
    else:
        assert len(ahead) == len(behind) == 2 and not ahead & behind


def test_the_bias_of_rows_that_are_at_different_positions_is_each_row_s():
    table = jnp.asarray(np.random.default_rng(3).standard_normal((7, 3)), jnp.float32)
    run = jax.jit(lambda mask: RelativeBias(TINY).apply({"params": {"table": table}}, mask))
    keys, at = jnp.arange(8)[None], jnp.asarray([[2, 3], [6, 7], [0, 1]])
    whole = run(Mask(keys, keys))
    rows = run(Mask(at, keys))
    for row, places in enumerate(at):
        np.testing.assert_array_equal(rows[row], whole[0][:, places])


def weights(model, params, side, name="attention"):
    _, found = model.apply(
        {"params": params}, SOURCE, TOKENS, SOURCE_MASK, MASK, mutable=["intermediates"]
    )
    return np.asarray(found["intermediates"][side]["blocks"][name]["weights"][0])


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_attention_without_queries_is_the_bias_alone_and_the_same_in_all_layers(side):
    params = params_of(MODEL)
    query = params[side]["blocks"]["attention"]["query"]
    blocks = params[side]["blocks"]
    attention = {**blocks["attention"], "query": jax.tree.map(jnp.zeros_like, query)}
    without = {**params, side: {**params[side], "blocks": {**blocks, "attention": attention}}}
    found = weights(MODEL, without, side)  # L B H T S
    kept = np.asarray(SOURCE_MASK if side == "encoder" else MASK)
    index = np.arange(kept.shape[1])
    table = np.asarray(params[side]["relative_bias"]["table"])
    after = index[None] - index[:, None]
    of = [released_bucket(a, side == "encoder", 7, 5) for a in after.ravel()]
    scores = table[np.reshape(of, after.shape)].transpose(2, 0, 1)[None]  # 1 H T S
    reads = kept[:, None, None] & ((after <= 0) | (side == "encoder"))
    unscaled = np.where(reads, np.exp(scores), 0)
    expected = unscaled / unscaled.sum(-1, keepdims=True)
    for layer in found:
        np.testing.assert_allclose(layer, expected, rtol=1e-5, atol=1e-7)


def test_attention_to_the_source_has_no_bias():
    params = params_of(MODEL)
    cross = params["decoder"]["blocks"]["cross_attention"]
    flat = {**cross, "query": jax.tree.map(jnp.zeros_like, cross["query"])}
    blocks = {**params["decoder"]["blocks"], "cross_attention": flat}
    without = {**params, "decoder": {**params["decoder"], "blocks": blocks}}
    found = weights(MODEL, without, "decoder", "cross_attention")
    kept = np.asarray(SOURCE_MASK)[None, :, None, None]
    even = np.broadcast_to(kept / kept.sum(-1, keepdims=True), found.shape)
    np.testing.assert_allclose(found, even, rtol=1e-6)


def test_without_biases_the_order_of_the_source_would_be_lost():
    params = params_of(MODEL)
    run = jax.jit(lambda params, source: MODEL.apply({"params": params}, source, TOKENS))

    def change(params):
        return np.abs(run(params, SOURCE) - run(params, SOURCE[:, ::-1])).max()

    assert change(params) > 0.1
    bias = jax.tree.map(jnp.zeros_like, params["encoder"]["relative_bias"])
    assert change({**params, "encoder": {**params["encoder"], "relative_bias": bias}}) < 1e-5


def test_tied_scores_are_of_states_divided_by_the_root_of_the_width():
    params, untied = params_of(MODEL), dataclasses.replace(TINY, tied_embeddings=False)
    head = {"table": params["embed"]["table"] / math.sqrt(15)}
    found = call(T5(untied), {**params, "head": head}, SOURCE, TOKENS, SOURCE_MASK)
    assert_same(found, call(MODEL, params, SOURCE, TOKENS, SOURCE_MASK))


@pytest.mark.parametrize(
    ("kind", "f"), [("geglu", nn.gelu), ("swiglu", nn.silu), ("relu", nn.relu)]
)
def test_feed_forward_layers_are_the_papers(kind, f):
    layer = t5.FeedForward(dataclasses.replace(TINY, feed_forward=kind))
    x = jax.random.normal(jax.random.key(0), (2, 3, 15))
    params = nn.unbox(layer.init(jax.random.key(1), x)["params"])
    w = {name: linear["kernel"] for name, linear in params.items()}
    assert all(set(linear) == {"kernel"} for linear in params.values())
    hidden = f(x @ w["up"]) if kind == "relu" else f(x @ w["gate"]) * (x @ w["up"])
    assert_same(layer.apply({"params": params}, x), hidden @ w["down"])


def test_weights_start_with_the_variances_of_the_authors():
    config = dataclasses.replace(TINY, embed_dim=60, mlp_dim=90, tied_embeddings=False)
    init = jax.jit(T5(config).init)
    params = nn.unbox(init(jax.random.key(0), SOURCE, TOKENS)["params"])
    block = params["decoder"]["blocks"]
    # Theirs of a query is (D K)^-0.5, without the division of scores by K^0.5.
    for leaf, std in (
        (params["embed"]["table"], 1.0),
        (params["head"]["table"], 60**-0.5),
        (block["attention"]["query"]["kernel"], (60 * 4) ** -0.5 * 4**0.5),
        (block["cross_attention"]["key"]["kernel"], 60**-0.5),
        (block["attention"]["out"]["kernel"], (3 * 4) ** -0.5),
        (block["mlp"]["up"]["kernel"], 60**-0.5),
        (block["mlp"]["down"]["kernel"], 90**-0.5),
    ):
        # Five standard errors of a standard deviation.
        assert float(leaf.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * leaf.size))


def test_dropout_acts_in_training_alone():
    params = params_of(MODEL)

    @jax.jit
    def run(key):
        return MODEL.apply(
            {"params": params}, SOURCE, TOKENS, SOURCE_MASK, MASK, True, rngs={"dropout": key}
        )

    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(-1).all()
    still = T5(dataclasses.replace(TINY, dropout_rate=0.0))
    run_still = jax.jit(
        lambda p: still.apply({"params": p}, SOURCE, TOKENS, SOURCE_MASK, MASK, True)
    )
    assert_same(run_still(params), call(MODEL, params, SOURCE, TOKENS, SOURCE_MASK, MASK))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (dict(num_decoder_layers=0), "num_decoder_layers must be at least 1, got 0"),
        (dict(num_buckets=3), "num_buckets must be at least 4, got 3"),
        (dict(max_distance=3), "max_distance must be more than num_buckets / 2 = 3, got 3"),
        (dict(dropout_rate=1.0), r"dropout_rate must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)
