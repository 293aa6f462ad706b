"""ALBERT is one block of BERT again and again, after narrow tables: a tenth of the parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lineage_jax.models import albert, bert
from lineage_jax.models.albert import Albert, AlbertConfig
from lineage_jax.models.bert import Bert, BertConfig, Block, MaskedLM, Pooled
from lineage_jax.nn import Mask

SIZES = dict(num_layers=3, embed_dim=12, num_heads=3, vocab_size=37, max_len=8)
TINY = AlbertConfig(**SIZES, table_dim=5)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(Albert(TINY).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        meta.unbox(shapes["params"]),
    )


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 37, (2, 8)), jnp.int32)


def test_it_is_bert_whose_layers_are_all_alike_and_its_gradient_is_their_sum(params, tokens):
    config = BertConfig(**SIZES, activation="gelu_tanh")
    mask = jnp.ones_like(tokens, bool).at[1, 5:].set(False)
    index = jnp.arange(8)[None]
    reads = Mask(index, index, readable=mask, causal=False)

    @jax.jit
    def in_bert(blocks, x):
        for i in range(TINY.num_layers):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
            x, _ = Block(config).apply({"params": block}, x, reads, None)
        return x

    @jax.jit
    def in_albert(block):
        return Albert(TINY).apply({"params": {**params, "block": block}}, tokens, mask=mask)

    captured = jax.jit(
        lambda: Albert(TINY).apply({"params": params}, tokens, capture_intermediates=True)[1]
    )()
    x = captured["intermediates"]["widen"]["__call__"][0]  # what enters the blocks
    blocks = jax.tree.map(lambda leaf: jnp.stack([leaf] * TINY.num_layers), params["block"])
    np.testing.assert_allclose(in_albert(params["block"]), in_bert(blocks, x), rtol=0, atol=1e-5)
    cotangent = jax.random.normal(jax.random.key(0), x.shape)
    (shared,) = jax.vjp(in_albert, params["block"])[1](cotangent)
    apart, _ = jax.vjp(in_bert, blocks, x)[1](cotangent)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(shared))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.sum(0), rtol=0, atol=1e-5 * largest),
        shared,
        apart,
    )


def test_depth_costs_no_parameters():
    deeper = dataclasses.replace(TINY, num_layers=24)
    assert bert.num_params(Albert(TINY)) == bert.num_params(Albert(deeper))


def test_layers_drop_different_units(params, tokens):
    # A block that adds one constant to each unit, unless it drops it, and norms: one layer leaves
    # two values, and so would three layers that drop the same units.
    zero = jax.tree.map(jnp.zeros_like, params)
    block = {**zero["block"]}
    block["mlp"] = {**block["mlp"], "down": {**block["mlp"]["down"], "bias": jnp.ones(12)}}
    for name in ("attention_norm", "mlp_norm"):
        block[name] = {"scale": jnp.ones(12), "bias": jnp.zeros(12)}
    c = dataclasses.replace(TINY, dropout_rate=0.5)
    given = {**zero, "block": block}
    run = jax.jit(
        lambda key: Albert(c).apply({"params": given}, tokens, train=True, rngs={"dropout": key})
    )
    values = np.unique(np.round(run(jax.random.key(0))[0, 0], 3))
    assert len(values) > 2


@pytest.mark.parametrize(
    ("preset", "released", "printed"),
    [
        # albert-base-v2 and so on, with the pooler and without heads. Table 1 prints what it does
        # to two or three digits, of the largest some 12 M more than was released.
        (albert.albert_base, 11_683_584, 12e6),
        (albert.albert_large, 17_683_968, 18e6),
        (albert.albert_xlarge, 58_724_864, 60e6),
        (albert.albert_xxlarge, 222_595_584, 235e6),
    ],
)
def test_there_are_as_many_parameters_as_were_released_and_nearly_as_printed(
    preset, released, printed
):
    count = bert.num_params(Pooled(Albert(preset())))
    assert count == released
    assert abs(count / printed - 1) < 0.06


def test_it_is_a_ninth_of_bert_as_the_paper_prints():
    # Table 1: 108 M and 334 M of BERT against 12 M and 18 M.
    ratios = [
        bert.num_params(Pooled(Bert(big()))) / bert.num_params(Pooled(Albert(small())))
        for big, small in (
            (bert.bert_base, albert.albert_base),
            (bert.bert_large, albert.albert_large),
        )
    ]
    assert ratios[0] == pytest.approx(108 / 12, rel=0.05)
    assert ratios[1] == pytest.approx(334 / 18, rel=0.05)


def test_the_head_scores_in_the_width_of_the_tables(tokens):
    shapes = jax.eval_shape(MaskedLM(Albert(TINY)).init, jax.random.key(0), tokens)
    params = meta.unbox(shapes["params"])
    assert params["masked_lm"]["dense"]["kernel"].shape == (12, 5)
    assert params["encoder"]["embeddings"]["tokens"]["table"].shape == (37, 5)
    assert "table" not in params["masked_lm"]


def test_tables_without_a_width_are_refused():
    with pytest.raises(ValueError, match="table_dim must be at least 1, got 0"):
        dataclasses.replace(TINY, table_dim=0)
