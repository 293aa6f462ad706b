"""Parameters laid out for decoding compute what they computed before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import gpt, llama, t5, transformer
from experiments.speaking import LANGUAGE_MODELS
from lineage_jax.models.t5 import T5
from lineage_jax.models.transformer import Transformer
from lineage_jax.nn.embed import COLUMNS
from lineage_jax.sampling.layout import for_decoding
from tests.nn.closeness import assert_same

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 5)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(5), IDS.shape)


def random_params(module, *inputs):
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


@pytest.mark.parametrize(
    "config",
    [
        gpt.tiny().model,
        dataclasses.replace(gpt.tiny().model, tied_embeddings=False, local_window=2),
        llama.tiny().model,
    ],
    ids=["gpt", "gpt-head-apart", "llama"],
)
def test_a_language_model_says_the_same_and_keeps_the_same_cache(config):
    build, empty_cache = LANGUAGE_MODELS[type(config)]
    module = build(config)
    params = random_params(module, IDS)

    @jax.jit
    def decode(params):
        return module.apply({"params": params}, IDS, POSITIONS, cache=empty_cache(config, 2, 7))

    assert_same(decode(for_decoding(params)), decode(params))


@pytest.mark.parametrize(
    "module", [Transformer(transformer.tiny().model), T5(t5.tiny().model)], ids=["marian", "t5"]
)
def test_a_translator_says_the_same_and_keeps_the_same_cache(module):
    params = random_params(module, IDS, IDS)

    @jax.jit
    def decode(params):
        variables = {"params": params}
        cache = module.apply(variables, IDS, None, 6, method="start")
        logits, cache = module.apply(variables, IDS, POSITIONS, cache, method="decode")
        return logits, cache.past, cache.memory

    assert_same(decode(for_decoding(params)), decode(params))


def test_layers_are_apart_and_scores_stand_in_columns():
    module = gpt.gpt.GPT(gpt.tiny().model)
    params = random_params(module, IDS)
    laid = for_decoding(params)
    assert sorted(laid["blocks"]) == [f"layer_{i}" for i in range(4)]
    np.testing.assert_array_equal(laid["embed"][COLUMNS].T, params["embed"]["table"])
    third = jax.tree.map(lambda leaf: leaf[2], params["blocks"])
    jax.tree.map(np.testing.assert_array_equal, laid["blocks"]["layer_2"], third)
