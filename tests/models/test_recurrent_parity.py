"""Recurrences, and the encoder-decoder that is made of them, compute what torch computes.

Each case comes from a golden folder, which needs no torch, and live with fresh weights (`-m
oracle`): outputs, final states and all gradients; float32, relative to the largest entry.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lineage_jax.models.seq2seq import Seq2Seq, Seq2SeqConfig
from lineage_jax.nn import GRU, LSTM, LSTMState
from tests.golden import make_recurrent
from tests.models.parity import assert_close

NUM_LAYERS, UNITS = 2, 7


def golden(name):
    folder = make_recurrent.FOLDER / name
    return [load_file(folder / f"{file}.safetensors") for file in ("model", "inputs", "expected")]


def live(name):
    pytest.importorskip("torch")
    return make_recurrent.compute(name, seed=1)


sources = pytest.mark.parametrize(
    "load", [pytest.param(golden), pytest.param(live, marks=pytest.mark.oracle)]
)


def gates_apart(weight, num_gates):
    """Their (gates x units, inputs) as our (inputs, gates, units)."""
    return jnp.moveaxis(weight.reshape(num_gates, -1, weight.shape[-1]), -1, 0)


def lstm_params(tensors, suffix):
    kernel, recurrent = (
        gates_apart(tensors[f"weight_{side}_{suffix}"], 4) for side in ("ih", "hh")
    )
    bias = tensors[f"bias_ih_{suffix}"] + tensors[f"bias_hh_{suffix}"]
    return {"kernel": kernel, "recurrent": recurrent, "bias": bias.reshape(4, -1)}


def gru_params(tensors, suffix):
    """Theirs has the gates (reset, update, candidate), and its update is the share that stays."""
    kernel, recurrent = (
        gates_apart(tensors[f"weight_{side}_{suffix}"], 3) for side in ("ih", "hh")
    )
    bias = (tensors[f"bias_ih_{suffix}"] + tensors[f"bias_hh_{suffix}"]).reshape(3, -1)

    def ours(x, axis):
        reset, update, candidate = jnp.split(x, 3, axis=axis)
        return jnp.concatenate([-update, reset, candidate], axis=axis)

    return {
        "kernel": ours(kernel, 1),
        "recurrent": ours(recurrent, 1),
        "bias": ours(bias, 0),
    }


def lengths_to_mask(lengths, length):
    return jnp.arange(length)[None] < jnp.asarray(lengths)[:, None]


def run_recurrence(kind, tensors, inputs, mask):
    """Two layers of both directions, each an `LSTM` or a `GRU` of ours, under torch's names."""
    x, after = inputs["x"], []
    for layer in range(NUM_LAYERS):
        outputs = []
        for side, suffix in enumerate((f"l{layer}", f"l{layer}_reverse")):
            number = 2 * layer + side
            if kind == "LSTM":
                module = LSTM(UNITS, init_scale=1.0, reverse=bool(side))
                params = lstm_params(tensors, suffix)
                state = LSTMState(inputs["hidden"][number], inputs["cell"][number])
            else:
                module = GRU(UNITS, stddev=1.0, reverse=bool(side))
                params, state = gru_params(tensors, suffix), inputs["hidden"][number]
            one, state = module.apply({"params": params}, x, state, mask)
            outputs.append(one)
            after.append(state)
        x = jnp.concatenate(outputs, axis=-1)
    stacked = jax.tree.map(lambda *states: jnp.stack(states), *after)
    states = stacked._asdict() if kind == "LSTM" else {"hidden": stacked}
    # torch has zeros where there is padding.
    return {"outputs": jnp.where(mask[..., None], x, 0.0), **states}


@pytest.mark.parity("recurrent layers", "`torch.nn` LSTM and GRU")
@sources
@pytest.mark.parametrize(("kind", "folder"), [("LSTM", "torch_lstm"), ("GRU", "torch_gru")])
def test_outputs_states_and_gradients_are_those_of_torch_on_packed_sequences(load, kind, folder):
    tensors, inputs, expected = load(folder)
    mask = lengths_to_mask(inputs["lengths"], inputs["x"].shape[1])
    differentiable = {name: inputs[name] for name in inputs if f"grad.{name}" in expected}

    @jax.jit
    def results(tensors, given):
        def loss(tensors, given):
            out = run_recurrence(kind, tensors, given, mask)
            return sum(jnp.sum(inputs[f"cotangent.{name}"] * x) for name, x in out.items()), out

        return jax.grad(loss, (0, 1), has_aux=True)(tensors, given)

    gradients, out = results(tensors, differentiable)
    for name, x in out.items():
        assert_close(x, expected[name], 1e-5, name)
    gradients = {**gradients[0], **gradients[1]}
    assert {f"grad.{name}" for name in gradients} == {n for n in expected if n.startswith("grad.")}
    for name, gradient in gradients.items():
        theirs = expected[f"grad.{name}"]
        if kind == "GRU" and name.startswith("weight_hh"):
            # The two units are the same where the candidate's matrix is diagonal: so are the
            # gradients along the diagonal, and no others.
            candidate = jnp.diagonal(gradient[2 * UNITS :])
            theirs_there = np.diagonal(theirs[2 * UNITS :])
            assert_close(candidate, theirs_there, 1e-5, name, "gradients")
        if kind == "GRU" and "_hh" in name:
            gradient, theirs = gradient[: 2 * UNITS], theirs[: 2 * UNITS]
        assert_close(gradient, theirs, 1e-5, name, "gradients")


def stacked_lstm(tensors, prefix):
    names = [name.removeprefix(f"{prefix}.") for name in tensors if name.startswith(f"{prefix}.")]
    theirs = {name: tensors[f"{prefix}.{name}"] for name in names}
    return {f"layer_{i}": lstm_params(theirs, f"l{i}") for i in range(len(names) // 4)}


@pytest.mark.parity("seq2seq", "`torch.nn` LSTM, twice")
@sources
def test_the_encoder_decoder_is_two_of_torch_in_loss_logits_and_every_gradient(load):
    tensors, inputs, expected = load("torch_seq2seq")
    config = Seq2SeqConfig(
        num_layers=3, embed_dim=5, hidden_dim=7, source_vocab_size=23, vocab_size=19
    )
    source_mask = lengths_to_mask(inputs["lengths"], inputs["source"].shape[1])
    mask = lengths_to_mask(inputs["target_lengths"], inputs["tokens"].shape[1])

    @jax.jit
    def results(tensors):
        def loss(tensors):
            sides = {
                side: {
                    "embed": {"table": tensors[f"{table}.weight"]},
                    "lstm": stacked_lstm(tensors, side),
                }
                for side, table in (("encoder", "source"), ("decoder", "target"))
            }
            logits = Seq2Seq(config).apply(
                {"params": {**sides, "head": {"table": tensors["head.weight"]}}},
                jnp.asarray(inputs["source"]),
                jnp.asarray(inputs["tokens"]),
                source_mask,
                mask,
            )
            scored = jnp.take_along_axis(
                jax.nn.log_softmax(logits), jnp.asarray(inputs["targets"])[..., None], axis=-1
            )[..., 0]
            return -jnp.sum(jnp.where(mask, scored, 0.0)) / mask.sum(), logits

        return jax.value_and_grad(loss, has_aux=True)(tensors)

    (loss, logits), gradients = results(tensors)
    kept = np.asarray(mask)
    assert_close(loss, expected["loss"], 1e-4, "loss")
    assert_close(logits[kept], expected["logits"][kept], 1e-4, "logits")
    for name, gradient in gradients.items():
        assert_close(gradient, expected[f"grad.{name}"], 1e-4, name, "gradients")
