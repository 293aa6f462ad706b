"""BERT reads both ways, leaves padding and other documents unread, and has its papers' sizes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from lineage_jax.models import bert
from lineage_jax.models.albert import Albert, AlbertConfig
from lineage_jax.models.bert import (
    Bert,
    BertConfig,
    Block,
    MaskedLM,
    PairClassifier,
    Pooled,
    PreTraining,
    SequenceClassifier,
    SpanFinder,
    TokenClassifier,
)
from lineage_jax.models.distilbert import DistilBert, DistilBertConfig
from lineage_jax.models.roberta import Roberta, RobertaConfig
from lineage_jax.nn import Mask
from lineage_jax.sharding import RULES

SIZES = dict(
    num_layers=3, embed_dim=30, num_heads=5, vocab_size=67, max_len=16, mlp_dim=37, num_labels=4
)
TINY = BertConfig(**SIZES)
LENGTH = 12
ENCODERS = {
    "bert": Bert(TINY),
    "roberta": Roberta(RobertaConfig(**SIZES, padding_id=2)),
    "albert": Albert(AlbertConfig(**SIZES, table_dim=7)),
    "distilbert": DistilBert(DistilBertConfig(**SIZES)),
}
HEADS = (Pooled, MaskedLM, PreTraining, PairClassifier, SequenceClassifier, TokenClassifier)


def random_params(model):
    """Every parameter random: zeros and ones would hide mistakes."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        meta.unbox(shapes["params"]),
    )


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    return ENCODERS[request.param]


@pytest.fixture(scope="module")
def params(encoder):
    return random_params(encoder)


@pytest.fixture(scope="module")
def run(encoder, params):
    """The encoder, compiled, from tokens and named arrays."""
    return jax.jit(lambda tokens, **named: encoder.apply({"params": params}, tokens, **named))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(5, 67, (3, LENGTH)), jnp.int32)


def test_every_position_sees_every_other(encoder, params, tokens):
    c = encoder.config
    first = c.num_positions - c.max_len  # RoBERTa's come after padding's

    @jax.jit
    def reads(table):
        def outputs(table):
            embeddings = {**params["embeddings"], "positions": {"table": table}}
            given = {**params, "embeddings": embeddings}
            return encoder.apply({"params": given}, tokens[:1])[0].sum(-1)

        return jnp.abs(jax.jacrev(outputs)(table)).max(-1)  # T, rows

    found = np.asarray(reads(params["embeddings"]["positions"]["table"]))
    assert (found[:, first : first + LENGTH] > 0).all()
    assert not found[:, first + LENGTH :].any() and not found[:, :first].any()


def test_padding_is_read_by_nobody(run, tokens):
    kept = np.ones((3, LENGTH), bool)
    kept[0, -4:] = kept[1, :3] = kept[2, 5:7] = False
    mask = jnp.asarray(kept)
    before = run(tokens, mask=mask)
    after = run(jnp.where(mask, tokens, (tokens + 7) % 60 + 5), mask=mask)
    np.testing.assert_array_equal(before[kept], after[kept])
    assert (before[~kept] != after[~kept]).any(-1).all()
    everything = run(tokens, mask=jnp.ones_like(mask))
    np.testing.assert_allclose(everything, run(tokens), rtol=0, atol=1e-6)
    assert (np.abs(everything - before)[kept] > 1e-3).any(-1).all()


def test_a_padded_row_is_the_row_without_its_padding(run, tokens):
    short = run(tokens[:, :7])
    mask = jnp.broadcast_to(jnp.arange(LENGTH) < 7, tokens.shape)
    np.testing.assert_allclose(run(tokens, mask=mask)[:, :7], short, rtol=0, atol=1e-5)


def test_a_packed_document_is_encoded_as_if_it_were_alone(encoder, run, tokens):
    sizes = (4, 1, 7)
    segment_ids = jnp.asarray(np.repeat([7, 2, 5], sizes))[None]
    first = encoder.config.num_positions - encoder.config.max_len  # RoBERTa's come after padding's
    positions = jnp.concatenate([first + jnp.arange(size) for size in sizes])[None]
    packed = run(tokens[:1], positions=positions, segment_ids=segment_ids)
    documents = np.split(tokens[0], np.cumsum(sizes)[:-1])
    alone = jnp.concatenate([run(document[None])[0] for document in documents])
    np.testing.assert_allclose(packed[0], alone, rtol=0, atol=1e-5)


def test_weights_sum_to_one_over_what_may_be_read(encoder, params, tokens):
    mask = jnp.broadcast_to(jnp.arange(LENGTH) < 9, tokens.shape)

    @jax.jit
    def sown(tokens):
        call = encoder.apply
        return call({"params": params}, tokens, mask=mask, mutable=["intermediates"])

    hidden, found = sown(tokens)
    found = found["intermediates"]
    (weights,) = found.get("blocks", found.get("block"))["attention"]["weights"]
    assert weights.shape == (3, 3, 5, LENGTH, LENGTH)  # L B H T S
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=1e-6)
    assert not weights[..., 9:].any() and (weights[..., :9] > 0).all()
    np.testing.assert_array_equal(found["hidden"][0], hidden)


def test_the_scan_over_depth_is_the_loop_over_depth(encoder, params, run, tokens):
    @jax.jit
    def by_hand(tokens):
        c, p = encoder.config, params["embeddings"]
        index = jnp.arange(LENGTH)[None]
        rows = index + c.num_positions - c.max_len
        x = p["tokens"]["table"][tokens] + p["positions"]["table"][rows]
        if c.num_types:
            x += p["types"]["table"][:1][None]
        centred = x - x.mean(-1, keepdims=True)
        x = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + c.norm_epsilon)
        x = x * p["norm"]["scale"][None, None] + p["norm"]["bias"][None, None]
        if "widen" in params:
            x = x @ params["widen"]["kernel"] + params["widen"]["bias"][None, None]
        mask = Mask(index, index, causal=False)
        for i in range(c.num_layers):
            block = params.get("block")
            if block is None:
                block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            x, _ = Block(c).apply({"params": block}, x, mask, None)
        return x

    looped = by_hand(tokens)
    np.testing.assert_allclose(run(tokens), looped, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ["albert"], indirect=True, scope="module")  # no scan of its own
@pytest.mark.parametrize("changes", [dict(remat="full"), dict(remat="dots"), dict(unroll=3)])
def test_neither_recomputing_nor_unrolling_changes_gradients(encoder, params, tokens, changes):
    def gradients(model):
        def loss(params):
            return jnp.square(model.apply({"params": params}, tokens)).mean()

        return jax.jit(jax.grad(loss))(params)

    changed = encoder.clone(config=dataclasses.replace(encoder.config, **changes))
    plain = gradients(encoder)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest),
        gradients(changed),
        plain,
    )


def test_dropout_acts_in_training_alone(encoder, params, tokens):
    model = encoder.clone(config=dataclasses.replace(encoder.config, dropout_rate=0.5))

    @jax.jit
    def trained(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, tokens, train=True, rngs=rngs)

    first = trained(jax.random.key(0))
    np.testing.assert_array_equal(first, trained(jax.random.key(0)))
    assert (first != trained(jax.random.key(1))).any()
    np.testing.assert_array_equal(
        jax.jit(lambda: model.apply({"params": params}, tokens))(),
        jax.jit(lambda: encoder.apply({"params": params}, tokens))(),
    )


@pytest.mark.parametrize("head", [*HEADS, SpanFinder], ids=lambda head: head.__name__)
def test_each_head_gives_float32_of_its_shape_whatever_is_computed_in(encoder, head, tokens):
    config = dataclasses.replace(encoder.config, dtype="bfloat16", dropout_rate=0.1)
    model = head(encoder.clone(config=config))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def apply(variables):
        return model.apply(variables, tokens, train=True, rngs={"dropout": jax.random.key(0)})

    found = jax.tree.leaves(jax.eval_shape(apply, meta.unbox(shapes)))
    token, pair, labels = (3, LENGTH, 67), (3, 2), (3, 4)
    expected = {
        Pooled: [(3, LENGTH, 30), (3, 30)],
        MaskedLM: [token],
        PreTraining: [token, pair],
        PairClassifier: [pair],
        SequenceClassifier: [labels],
        TokenClassifier: [(3, LENGTH, 4)],
        SpanFinder: [(3, LENGTH), (3, LENGTH)],
    }
    assert [x.shape for x in found] == expected[head]
    if head is not Pooled:
        assert all(x.dtype == jnp.float32 for x in found)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_each_parameter_names_its_axes_and_each_name_has_a_rule(encoder, head, tied):
    model = head(encoder.clone(config=dataclasses.replace(encoder.config, tied_embeddings=tied)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    boxed = jax.tree.leaves(
        shapes["params"], is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata)
    )
    for leaf in boxed:
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == leaf.unbox().ndim
        axes = [axis for name in leaf.names for axis in RULES[name]]
        assert len(axes) == len(set(axes)), leaf.names


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_of_tokens_scores_them_if_it_is_tied_and_else_another(tokens, tied):
    model = MaskedLM(Bert(dataclasses.replace(TINY, tied_embeddings=tied)))
    tokens = jnp.where(tokens == 66, 5, tokens)  # row 66 is looked up by none

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: model.apply({"params": p}, tokens)[..., 66].sum())(params)

    found = gradient(random_params(model))
    table, head = found["encoder"]["embeddings"]["tokens"]["table"], found["masked_lm"]
    assert ("table" in head) is not tied
    assert jnp.any(table[66]) == tied  # only scoring can teach it
    if not tied:
        assert jnp.any(head["table"]["table"][66])


@pytest.mark.parametrize(
    ("preset", "count"),
    [(bert.bert_base, 109_482_240), (bert.bert_large, 335_141_888)],
)
def test_there_are_as_many_parameters_as_were_released(preset, count):
    # bert-base-uncased and bert-large-uncased, with the pooler and without heads; the paper prints
    # 110 M and 340 M.
    assert bert.num_params(Pooled(Bert(preset()))) == count


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_heads=7), "num_heads=7 must divide embed_dim=30"),
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(num_types=-1), "num_types must be at least 0, got -1"),
        (dict(num_labels=0), "num_labels must be at least 1, got 0"),
        (dict(dropout_rate=1.0), r"dropout_rate must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_rows_that_are_too_long_and_types_that_have_no_table_are_refused(encoder, run, tokens):
    with pytest.raises(ValueError, match="at most max_len=16 tokens a sequence, got 17"):
        run(jnp.zeros((1, 17), jnp.int32))
    if not encoder.config.num_types:
        with pytest.raises(ValueError, match="no table of types"):
            run(tokens, types=jnp.zeros_like(tokens))


def test_the_exact_gelu_is_x_times_the_normal_distribution():
    x = np.linspace(-5, 5, 41)
    expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    found = bert.ACTIVATIONS["gelu"](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    tanh = bert.ACTIVATIONS["gelu_tanh"](jnp.asarray(x, jnp.float32))
    assert 1e-4 < np.abs(tanh - found).max() < 1e-3
