"""One model, theirs and ours: what every comparison with `transformers` has in common.

Each case comes from a golden folder, which needs no torch, and live with fresh weights (`-m
oracle`): the loss, the logits, and the gradient of the loss with respect to every parameter, end to
end within 1e-4, and each block with its gradients within 1e-5; float32, relative to the largest
entry.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lineage_jax.objectives.language import next_token_loss
from lineage_jax.pretrained.architecture import Architecture
from lineage_jax.pretrained.tensors import to_ours
from lineage_jax.pretrained.weights import of, shapes
from tests.golden import make
from tests.parity_table import record

FOLDER = pathlib.Path(make.__file__).parent


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of theirs: tensors by their names, inputs, and what they computed from them."""

    theirs: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]

    @property
    def architecture(self) -> Architecture:
        return of(self.theirs)

    @property
    def config(self) -> Any:
        return self.architecture.config(self.theirs)

    def params(self, tensors):
        module = self.architecture.module(self.config)
        return to_ours(
            self.architecture.table(self.config), shapes(module, self.architecture), tensors
        )


def golden(name: str) -> Case:
    """What the folder of that name holds."""
    folder = FOLDER / name
    config = json.loads((folder / "config.json").read_text())
    files = ("model", "inputs", "expected")
    arrays = [load_file(folder / f"{file}.safetensors") for file in files]
    return Case(config, *arrays)


def live(name: str) -> Case:
    """The same architecture in other sizes, with other weights and inputs, computed now."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = make.CONFIGS[name]
    sizes = dict(n_embd=30, n_inner=71, hidden_size=30, intermediate_size=71, window_size=4)
    sizes |= dict(num_attention_heads=6, num_key_value_heads=3, head_dim=4, sliding_window=4)
    theirs = {key: sizes.get(key, value) for key, value in theirs.items()}
    inputs = make.inputs(theirs["vocab_size"], seed=1)
    model, expected = make.reference(theirs, inputs, seed=1)
    return Case(theirs, make.weights(model), inputs, expected)


def cases(names: Iterable[str]) -> list:
    """Parameters of a fixture, `(golden or live, name)`, for each of those configs."""
    return [
        *[pytest.param((golden, name), id=name) for name in names],
        *[
            pytest.param((live, name), id=f"{name}-live", marks=pytest.mark.oracle)
            for name in names
        ],
    ]


def assert_close(ours, theirs, tolerance, what, of="outputs"):
    """Within `tolerance` of the largest entry of theirs."""
    assert np.shape(ours) == np.shape(theirs), what
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    record(of, error)
    assert error <= tolerance, f"{what}: relative error {error:.1e} > {tolerance:.0e}"


def assert_gradient_close(gradient, expected, name, tolerance):
    """As `assert_close`; a key's bias moves no softmax, and has a gradient of rounding alone.

    It is then measured against the gradient of the value's bias.
    """
    theirs = expected[f"grad.{name}"]
    value = name.replace("k_proj.bias", "v_proj.bias").replace("key.bias", "value.bias")
    if value == name:
        assert_close(gradient, theirs, tolerance, name, "gradients")
    else:
        largest = np.abs(expected[f"grad.{value}"]).max()
        assert np.abs(gradient - theirs).max() <= tolerance * largest, name


def check_end_to_end(case: Case) -> None:
    """The loss, the logits and every gradient are theirs within 1e-4."""
    x = {name: jnp.asarray(array) for name, array in case.inputs.items()}
    kept = case.inputs["attention_mask"].astype(bool)
    model = case.architecture.module(case.config)

    @jax.jit
    def loss_and_gradients(tensors):
        def loss(tensors):
            logits, _ = model.apply(
                {"params": case.params(tensors)},
                x["input_ids"],
                x["position_ids"],
                mask=x["attention_mask"].astype(bool),
            )
            value, _ = next_token_loss(logits, x["targets"], x["target_mask"])
            return value, logits

        return jax.value_and_grad(loss, has_aux=True)(tensors)

    (loss, logits), gradients = loss_and_gradients(case.tensors)
    assert_close(loss, case.expected["loss"], 1e-4, "loss")
    assert_close(logits[kept], case.expected["logits"][kept], 1e-4, "logits")
    assert len(gradients) == sum(name.startswith("grad.") for name in case.expected)
    for name, gradient in gradients.items():
        assert_gradient_close(gradient, case.expected, name, 1e-4)


def check_blocks(
    case: Case,
    apply_block: Callable[[Any, jax.Array, jax.Array], jax.Array],
    prefix: str,
    count: range,
) -> None:
    """Each block, from what they feed it, and its gradients are theirs within 1e-5.

    Args:
      case: whose blocks.
      apply_block: from one block's parameters, x and the block's number, the block's output.
      prefix: of the names of a block's tensors there, with {} for its number.
      count: how many tensors a block has there.
    """
    expected = case.expected
    kept = case.inputs["attention_mask"].astype(bool)

    @jax.jit
    def block(tensors, x, layer, cotangent):
        def apply(tensors, x):
            params = jax.tree.map(lambda p: p[layer], case.params(tensors)["blocks"])
            return apply_block(params, x, layer)

        y, pull_back = jax.vjp(apply, tensors, x)
        return y, *pull_back(cotangent)

    for i in range(case.config.num_layers):
        y, gradients, x_gradient = block(
            case.tensors, expected[f"hidden.{i}"], i, expected[f"hidden_grad.{i + 1}"]
        )
        assert_close(y[kept], expected[f"hidden.{i + 1}"][kept], 1e-5, f"block {i}")
        assert_close(
            x_gradient, expected[f"hidden_grad.{i}"], 1e-5, f"gradient into block {i}", "gradients"
        )
        mine = [name for name in gradients if name.startswith(prefix.format(i))]
        assert len(mine) in count, mine
        for name in mine:
            assert_gradient_close(gradients[name], expected, name, 1e-5)
