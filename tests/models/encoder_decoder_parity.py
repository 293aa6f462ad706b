"""One encoder-decoder, theirs and ours: what comparisons with `transformers` have in common.

As `parity.py` has it: loss, logits and every gradient end to end within 1e-4, each block of either
side with its gradients within 1e-5; float32, relative to the largest entry.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lineage_jax.objectives.language import next_token_loss
from tests.golden import encoder_decoders as make
from tests.models.parity import Case, assert_close, assert_gradient_close, golden

Apply = Callable[[Any, jax.Array, jax.Array, int], jax.Array]
"""(one block's parameters, x, what the encoder returned, the block's number) -> its output."""


def live(name: str, **odd: Any) -> Case:
    """The same architecture in other sizes, with other weights and inputs, computed now."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = make.CONFIGS[name] | odd
    inputs = make.inputs(*make.sizes(theirs), seed=1)
    model, expected = make.reference(theirs, inputs, seed=1)
    return Case(theirs, make.tensors(model), inputs, expected)


def cases(names: Iterable[str], **odd: Any) -> list:
    """Parameters of a fixture, functions that make a case, for each of those configs."""
    names = list(names)
    golden_cases = [pytest.param(lambda name=name: golden(name), id=name) for name in names]
    live_cases = [
        pytest.param(
            lambda name=name: live(name, **odd), id=f"{name}-live", marks=pytest.mark.oracle
        )
        for name in names
    ]
    return golden_cases + live_cases


def check_end_to_end(case: Case) -> None:
    """The loss, the logits and every gradient are theirs within 1e-4."""
    x = {name: jnp.asarray(array) for name, array in case.inputs.items()}
    kept = case.inputs["decoder_attention_mask"].astype(bool)
    model = case.architecture.module(case.config)

    @jax.jit
    def loss_and_gradients(tensors):
        def loss(tensors):
            logits = model.apply(
                {"params": case.params(tensors)},
                x["input_ids"],
                x["decoder_input_ids"],
                x["attention_mask"].astype(bool),
                x["decoder_attention_mask"].astype(bool),
            )
            value, _ = next_token_loss(logits, x["targets"], x["target_mask"])
            return value, logits

        return jax.value_and_grad(loss, has_aux=True)(tensors)

    (loss, logits), gradients = loss_and_gradients(case.tensors)
    assert_close(loss, case.expected["loss"], 1e-4, "loss")
    assert_close(logits[kept], case.expected["logits"][kept], 1e-4, "logits")
    known = {name.removeprefix("grad.") for name in case.expected if name.startswith("grad.")}
    assert known == set(gradients) - {"final_logits_bias"}  # which they do not train
    for name in known:
        assert_gradient_close(gradients[name], case.expected, name, 1e-4)


def check_blocks(case: Case, side: str, apply_block: Apply, prefix: str, count: int) -> None:
    """Each block of that side, from what they feed it, and its gradients are theirs within 1e-5.

    Args:
      case: whose blocks.
      side: "encoder" or "decoder".
      apply_block: runs one of ours.
      prefix: of the names of a block's tensors there, with {} for its number.
      count: how many tensors a block has there.
    """
    expected = case.expected
    mask = "attention_mask" if side == "encoder" else "decoder_attention_mask"
    kept = case.inputs[mask].astype(bool)
    depth = sum(name.startswith(f"{side}.hidden.") for name in expected) - 1
    encoded = last(expected, "encoder")

    @jax.jit
    def block(tensors, x, layer, cotangent):
        def apply(tensors, x):
            blocks = case.params(tensors)[side]["blocks"]
            params = jax.tree.map(lambda p: p[layer], blocks)
            return apply_block(params, x, encoded, layer)

        y, pull_back = jax.vjp(apply, tensors, x)
        return y, *pull_back(cotangent)

    for i in range(depth):
        y, gradients, x_gradient = block(
            case.tensors, expected[f"{side}.hidden.{i}"], i, expected[f"{side}.hidden_grad.{i + 1}"]
        )
        assert_close(y[kept], expected[f"{side}.hidden.{i + 1}"][kept], 1e-5, f"{side} block {i}")
        into = expected[f"{side}.hidden_grad.{i}"]
        assert_close(x_gradient, into, 1e-5, f"gradient into {side} block {i}", "gradients")
        mine = [name for name in gradients if name.startswith(prefix.format(i))]
        assert len(mine) == count, mine
        for name in mine:
            assert_gradient_close(gradients[name], expected, name, 1e-5)


def last(expected, side: str) -> jax.Array:
    """The hidden states out of the last block of that side."""
    depth = sum(name.startswith(f"{side}.hidden.") for name in expected) - 1
    return jnp.asarray(expected[f"{side}.hidden.{depth}"])
