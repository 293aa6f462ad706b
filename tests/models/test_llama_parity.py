"""LLaMA, with each head and scaling, and Mistral compute what `transformers` computes."""

import jax.numpy as jnp
import pytest

from lineage_jax.models.llama import Block
from lineage_jax.nn import Mask
from tests.models.parity import cases, check_blocks, check_end_to_end

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=cases(["llama", "llama_tied", "llama_scaled", "mistral"]))
def case(request):
    load, name = request.param
    return load(name)


def test_loss_logits_and_every_gradient_are_those_of_transformers(case):
    check_end_to_end(case)


def test_each_block_and_its_gradients_are_those_of_transformers(case):
    x = {name: jnp.asarray(array) for name, array in case.inputs.items()}
    index = jnp.arange(x["input_ids"].shape[1])[None]
    ids = x["attention_mask"]
    shared = (x["position_ids"], Mask(index, index, ids, ids))

    def apply_block(params, x, layer):
        return Block(case.config).apply({"params": params}, x, shared, None)[0]

    check_blocks(case, apply_block, "model.layers.{}.", range(9, 10))
