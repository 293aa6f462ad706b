"""GPT-1, GPT-2 and GPT-3's alternating layers compute what `transformers` computes.

Against golden folders, which need no torch, and live with fresh weights (`-m oracle`): the loss,
the logits, and the gradient of the loss with respect to every parameter, end to end within 1e-4,
and each block with its gradients within 1e-5; float32, relative to the largest entry.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lineage_jax.models.gpt import GPT, Block, GPTConfig, windows
from lineage_jax.objectives.language import next_token_loss
from tests.golden import make
from tests.models.hugging_face import from_hugging_face, gpt_config

FOLDER = pathlib.Path(make.__file__).parent


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of theirs: tensors by their names, inputs, and what they computed from them."""

    model_type: str
    config: GPTConfig
    tensors: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]

    def params(self, tensors):
        return from_hugging_face(self.model_type, self.config, tensors)


def golden(name):
    folder = FOLDER / name
    config = json.loads((folder / "config.json").read_text())
    files = ("model", "inputs", "expected")
    arrays = [load_file(folder / f"{file}.safetensors") for file in files]
    return Case(config["model_type"], gpt_config(config), *arrays)


def live(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sizes = dict(n_embd=30, n_inner=71, hidden_size=30, intermediate_size=71, window_size=4)
    theirs = make.CONFIGS[name]
    theirs = {key: sizes.get(key, value) for key, value in theirs.items()}
    inputs = make.inputs(theirs["vocab_size"], seed=1)
    model, expected = make.reference(theirs, inputs, seed=1)
    return Case(theirs["model_type"], gpt_config(theirs), make.weights(model), inputs, expected)


GOLDEN = [pytest.param((golden, name), id=name) for name in make.CONFIGS]
LIVE = [
    pytest.param((live, name), id=f"{name}-live", marks=pytest.mark.oracle) for name in make.CONFIGS
]


@pytest.fixture(scope="module", params=[*GOLDEN, *LIVE])
def case(request):
    load, name = request.param
    return load(name)


def assert_close(ours, theirs, tolerance, what):
    """Within `tolerance` of the largest entry of theirs."""
    assert np.shape(ours) == np.shape(theirs), what
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, f"{what}: relative error {error:.1e} > {tolerance:.0e}"


def test_loss_logits_and_every_gradient_are_those_of_transformers(case):
    x = {name: jnp.asarray(array) for name, array in case.inputs.items()}
    kept = case.inputs["attention_mask"].astype(bool)

    @jax.jit
    def loss_and_gradients(tensors):
        def loss(tensors):
            # Padding is a document of its own: nobody reads it, as their mask has it.
            logits, _ = GPT(case.config).apply(
                {"params": case.params(tensors)},
                x["input_ids"],
                x["position_ids"],
                x["attention_mask"],
            )
            value, _ = next_token_loss(logits, x["targets"], x["target_mask"])
            return value, logits

        return jax.value_and_grad(loss, has_aux=True)(tensors)

    (loss, logits), gradients = loss_and_gradients(case.tensors)
    assert_close(loss, case.expected["loss"], 1e-4, "loss")
    assert_close(logits[kept], case.expected["logits"][kept], 1e-4, "logits")
    for name, gradient in gradients.items():
        assert_close(gradient, case.expected[f"grad.{name}"], 1e-4, name)


def test_each_block_and_its_gradients_are_those_of_transformers(case):
    config, expected = case.config, case.expected
    index = jnp.arange(case.inputs["input_ids"].shape[1])[None]
    kept = case.inputs["attention_mask"].astype(bool)
    shared = (index, index, jnp.asarray(case.inputs["attention_mask"]))

    @jax.jit
    def block(tensors, x, layer, cotangent):
        def apply(tensors, x):
            params = jax.tree.map(lambda p: p[layer], case.params(tensors)["blocks"])
            per_layer = (windows(config)[layer], None)
            return Block(config).apply({"params": params}, x, shared, per_layer)[0]

        y, pull_back = jax.vjp(apply, tensors, x)
        return y, *pull_back(cotangent)

    for i in range(config.num_layers):
        y, gradients, x_gradient = block(
            case.tensors, expected[f"hidden.{i}"], i, expected[f"hidden_grad.{i + 1}"]
        )
        assert_close(y[kept], expected[f"hidden.{i + 1}"][kept], 1e-5, f"block {i}")
        assert_close(x_gradient, expected[f"hidden_grad.{i}"], 1e-5, f"gradient into block {i}")
        mine = [name for name in gradients if f".h.{i}." in name]
        assert len(mine) in (12, 13), mine
        for name in mine:
            assert_close(gradients[name], expected[f"grad.{name}"], 1e-5, name)


def test_a_tensor_that_no_parameter_wants_is_refused():
    case = golden("gpt2")
    with pytest.raises(ValueError, match=r"no parameter of gpt2 is called h\.0\.extra"):
        case.params({**case.tensors, "h.0.extra": np.zeros(1)})
