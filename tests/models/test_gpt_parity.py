"""GPT-1, GPT-2 and GPT-3's alternating layers compute what `transformers` computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.models.gpt import Block, windows
from lineage_jax.nn import Mask
from tests.models.parity import cases, check_blocks, check_end_to_end, golden

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=cases(["gpt1", "gpt2", "gpt_neo"]))
def case(request):
    load, name = request.param
    return load(name)


def test_loss_logits_and_every_gradient_are_those_of_transformers(case):
    check_end_to_end(case)


def test_each_block_and_its_gradients_are_those_of_transformers(case):
    index = jnp.arange(case.inputs["input_ids"].shape[1])[None]
    ids = jnp.asarray(case.inputs["attention_mask"])
    shared = (index, Mask(index, index, ids, ids))

    def apply_block(params, x, layer):
        per_layer = (windows(case.config)[layer], None)
        return Block(case.config).apply({"params": params}, x, shared, per_layer)[0]

    check_blocks(case, apply_block, "transformer.h.{}.", range(12, 14))


def test_a_tensor_that_no_parameter_wants_is_refused():
    case = golden("gpt2")
    with pytest.raises(ValueError, match=r"no parameter is called h\.0\.extra"):
        case.params({**case.tensors, "h.0.extra": np.zeros(1)})
