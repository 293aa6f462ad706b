"""RoBERTa counts positions over what is no padding, and has its paper's sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lineage_jax.models import bert, roberta
from lineage_jax.models.bert import Bert, BertConfig, MaskedLM
from lineage_jax.models.roberta import Roberta, RobertaConfig

SIZES = dict(num_layers=2, embed_dim=12, num_heads=3, vocab_size=37, max_len=8)
TINY = RobertaConfig(**SIZES, padding_id=4, activation="relu")


def random_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        meta.unbox(shapes["params"]),
    )


def test_positions_are_counted_from_the_id_of_padding_over_what_is_none():
    tokens = jnp.asarray([[9, 8, 7, 4, 4], [4, 4, 9, 8, 7], [9, 4, 4, 8, 7], [9, 9, 9, 9, 9]])
    expected = [[5, 6, 7, 4, 4], [4, 4, 5, 6, 7], [5, 4, 4, 6, 7], [5, 6, 7, 8, 9]]
    assert Roberta(TINY).positions(tokens).tolist() == expected
    assert TINY.num_positions == 13


def test_padding_on_the_left_changes_nothing():
    model = Roberta(TINY)
    params = random_params(model)
    run = jax.jit(lambda tokens, mask: model.apply({"params": params}, tokens, mask=mask))
    tokens = jnp.asarray([[9, 8, 7, 6, 5]])
    padded = jnp.asarray([[4, 4, 9, 8, 7, 6, 5]])
    found = run(padded, padded != 4)[:, 2:]
    np.testing.assert_allclose(found, run(tokens, tokens != 4), rtol=0, atol=1e-6)


def test_it_is_bert_with_its_positions_moved():
    model, plain = Roberta(TINY), Bert(BertConfig(**SIZES, num_types=1, norm_epsilon=1e-5))
    plain = plain.clone(config=dataclasses.replace(plain.config, activation="relu"))
    params = random_params(model)
    tables = params["embeddings"]
    positions = {"table": tables["positions"]["table"][5:]}
    moved = {**params, "embeddings": {**tables, "positions": positions}}
    tokens = jnp.asarray([[9, 8, 7, 6, 5]])
    np.testing.assert_array_equal(
        jax.jit(lambda: model.apply({"params": params}, tokens))(),
        jax.jit(lambda: plain.apply({"params": moved}, tokens))(),
    )


def test_the_head_has_the_exact_gelu_whatever_the_blocks_have():
    model = roberta.masked_lm(TINY)
    params, tokens = random_params(model), jnp.asarray([[9, 8, 7, 6, 5]])
    run = lambda model: jax.jit(lambda: model.apply({"params": params}, tokens))()  # noqa: E731
    exact = MaskedLM(Roberta(TINY), activation="gelu")
    np.testing.assert_array_equal(run(model), run(exact))
    assert (run(model) != run(MaskedLM(Roberta(TINY)))).any()


@pytest.mark.parametrize(
    ("preset", "count"),
    # roberta-base and roberta-large with their heads; section 5 prints 355 M of the latter.
    [(roberta.roberta_base, 124_697_433), (roberta.roberta_large, 355_412_057)],
)
def test_there_are_as_many_parameters_as_were_released(preset, count):
    assert bert.num_params(roberta.masked_lm(preset())) == count


def test_an_id_of_padding_that_is_none_is_refused():
    with pytest.raises(ValueError, match="padding_id must be at least 0, got -1"):
        dataclasses.replace(TINY, padding_id=-1)
