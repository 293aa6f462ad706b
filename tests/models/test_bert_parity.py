"""BERT and its children compute what `transformers` computes, under every head.

Each case comes from a golden folder, and live with fresh weights (`-m oracle`): the loss, every
output and the gradient of the loss with respect to every parameter within 1e-4, and each block with
its gradients within 1e-5; float32, relative to the largest entry.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.models.bert import Block
from lineage_jax.nn import Mask
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.objectives.masked import masked_token_loss, pretraining_loss
from tests.golden import make
from tests.models.parity import Case, assert_close, golden

pytestmark = pytest.mark.parity


def live(name: str) -> Case:
    """The same class in other sizes, with other weights and inputs, computed now."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sizes = dict(hidden_size=18, intermediate_size=29, num_attention_heads=3, vocab_size=53)
    sizes |= dict(dim=18, hidden_dim=29, n_heads=3, num_hidden_layers=2, n_layers=2)
    theirs = {key: sizes.get(key, value) for key, value in make.ENCODERS[name].items()}
    arrays = make.encoder_inputs(theirs, seed=1)
    model, expected = make.encoder_reference(theirs, arrays, seed=1)
    return Case(theirs, make.weights(model), arrays, expected)


@pytest.fixture(
    scope="module",
    params=[
        *[pytest.param((golden, name), id=name) for name in make.ENCODERS],
        *[
            pytest.param((live, name), id=f"{name}-live", marks=pytest.mark.oracle)
            for name in make.ENCODERS
        ],
    ],
)
def case(request):
    load, name = request.param
    return load(name)


def mean_loss(logits, targets):
    """Cross-entropy of one target in each row."""
    return next_token_loss(logits[:, None], targets[:, None], jnp.ones((len(targets), 1), bool))[0]


def loss_of(outputs, x, num_labels):
    """What their class computes of its outputs and the labels."""
    if "start_logits" in outputs:
        ends = outputs["start_logits"], outputs["end_logits"]
        return sum(mean_loss(*end) for end in zip(ends, x["ends"], strict=True)) / 2
    if "prediction_logits" in outputs:
        tokens, pairs = (value for name, value in outputs.items() if name.endswith("logits"))
        return pretraining_loss(tokens, pairs, x["targets"], x["target_mask"], x["label"])[0]
    logits = outputs["logits"]
    if logits.ndim == 2:
        return mean_loss(logits, x["label"])
    targets = x["targets"] % num_labels if logits.shape[-1] == num_labels else x["targets"]
    return masked_token_loss(logits, targets, x["target_mask"])[0]


def moves_nothing(name, case):
    """Whether a gradient is zero but for rounding.

    The bias of keys adds the same to all scores of a query, and those of the last norm and of the
    map after it add the same to all scores of where an answer starts: no softmax notices.
    """
    last = f"layer.{case.config.num_layers - 1}.output.LayerNorm.bias"
    finds_answers = case.architecture.name.endswith("ForQuestionAnswering")
    answers = finds_answers and name.endswith((last, "qa_outputs.bias"))
    return answers or name.endswith(("key.bias", "k_lin.bias"))


@pytest.fixture(scope="module")
def ours(case):
    """Our loss, outputs, and gradients with respect to their tensors."""
    model = case.architecture.module(case.config)
    x = {name: jnp.asarray(array) for name, array in case.inputs.items()}
    given = {name: x[name] for name in make.INPUTS if name in x}

    @jax.jit
    def run(tensors):
        def loss(tensors):
            outputs = case.architecture.call(model, case.params(tensors), **given)
            return loss_of(outputs, x, case.config.num_labels), outputs

        return jax.value_and_grad(loss, has_aux=True)(tensors)

    (loss, outputs), gradients = run(case.tensors)
    return loss, outputs, gradients


def test_the_loss_and_every_output_are_those_of_transformers(case, ours):
    loss, outputs, _ = ours
    assert_close(loss, case.expected["loss"], 1e-4, "loss")
    last = f"hidden.{case.config.num_layers}"
    for name, output in outputs.items():
        expected = case.expected[last if name == "last_hidden_state" else name]
        assert_close(output, expected, 1e-4, name)
    found = [name for name in case.expected if name.endswith("logits")]
    assert found and set(outputs) == {"last_hidden_state", *found}


def test_the_gradient_of_every_parameter_is_that_of_transformers(case, ours):
    *_, gradients = ours
    assert {f"grad.{name}" for name in gradients} == {
        name for name in case.expected if name.startswith("grad.")
    }
    for name, gradient in gradients.items():
        expected = case.expected[f"grad.{name}"]
        if moves_nothing(name, case):
            assert np.abs(gradient).max() < 1e-6 > np.abs(expected).max(), name
        else:
            assert_close(gradient, expected, 1e-4, name, "gradients")


def test_each_block_and_its_gradients_are_those_of_transformers(case):
    expected, c = case.expected, case.config
    index = jnp.arange(case.inputs["input_ids"].shape[1])[None]
    readable = jnp.asarray(case.inputs["attention_mask"], bool)
    mask = Mask(index, index, readable=readable, causal=False)
    shared_by_all = c.__class__.__name__ == "AlbertConfig"

    @jax.jit
    def block(tensors, x, layer, cotangent):
        def apply(tensors, x):
            params = case.params(tensors)["encoder"]
            params = (
                params["block"]
                if shared_by_all
                else jax.tree.map(lambda leaf: leaf[layer], params["blocks"])
            )
            return Block(c).apply({"params": params}, x, mask, None)[0]

        y, pull_back = jax.vjp(apply, tensors, x)
        return y, *pull_back(cotangent)

    total = {name: 0.0 for name in case.tensors}
    for i in range(c.num_layers):
        cotangent = expected[f"hidden_grad.{i + 1}"]
        y, gradients, x_gradient = block(case.tensors, expected[f"hidden.{i}"], i, cotangent)
        assert_close(y, expected[f"hidden.{i + 1}"], 1e-5, f"block {i}")
        assert_close(
            x_gradient, expected[f"hidden_grad.{i}"], 1e-5, f"gradient into block {i}", "gradients"
        )
        total = {name: total[name] + gradients[name] for name in total}
    # A layer's parameters have a gradient in their layer alone; ALBERT's are the sum over layers.
    mine = [name for name in total if ".layer." in name or "albert_layers" in name]
    assert len(mine) == 16 * (1 if shared_by_all else c.num_layers)
    for name in mine:
        if not moves_nothing(name, case):
            assert_close(total[name], expected[f"grad.{name}"], 1e-5, name, "gradients")
