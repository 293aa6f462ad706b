"""AWD-LSTM and the classifier on it compute what torch computes, given the masks of dropout.

Each case comes from a golden folder, which needs no torch, and live with fresh weights (`-m
oracle`): outputs and all gradients, end to end within 1e-4, float32, relative to the largest entry.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

from experiments.ulmfit import PenaltyConfig, loss_fn
from lineage_jax.models.ulmfit import Classifier, ClassifierConfig, ULMFiT, concat_pooled
from tests.golden import make_awd_lstm
from tests.golden.make_awd_lstm import FOLDER, VOCAB
from tests.models.parity import assert_close
from tests.models.test_recurrent_parity import gates_apart, lengths_to_mask, lstm_params

CONFIG = ClassifierConfig(
    num_layers=3,
    embed_dim=5,
    hidden_dim=7,
    vocab_size=VOCAB,
    max_len=8,
    num_labels=4,
    classifier_dim=6,
)


def golden(name):
    folder = FOLDER / name
    return [load_file(folder / f"{file}.safetensors") for file in ("model", "inputs", "expected")]


def live(name):
    pytest.importorskip("torch")
    return make_awd_lstm.FOLDERS[name](seed=1)


sources = pytest.mark.parametrize(
    "load", [pytest.param(golden), pytest.param(live, marks=pytest.mark.oracle)]
)


def with_masks(inputs):
    """Dropout in training multiplies by these masks of theirs, each of which must be asked for."""
    masks = {
        ("drop_words",): [inputs["words"]],
        ("drop_input",): [inputs["input"]],
        ("drop_hidden",): [inputs["hidden_0"], inputs["hidden_1"]],
        ("drop_output",): [inputs["output"]],
        **{(f"layer_{i}", "Dropout_0"): [gates_apart(inputs[f"weights_{i}"], 4)] for i in range(3)},
        **{(f"block_{i}", "Dropout_0"): [inputs.get(f"block_{i}")] for i in range(2)},
    }
    calls = collections.Counter()

    def interceptor(call, args, kwargs, context):
        if not isinstance(context.module, nn.Dropout) or context.method_name != "__call__":
            return call(*args, **kwargs)
        assert kwargs["deterministic"] is False
        place = tuple(part for part in context.module.path if part != "encoder")
        calls[place] += 1
        mask = masks[place][calls[place] - 1]
        along = context.module.broadcast_dims
        shape = [1 if axis in along else n for axis, n in enumerate(args[0].shape)]
        assert list(mask.shape) == shape, place
        return args[0] * mask

    return nn.intercept_methods(interceptor), calls


def encoder_params(tensors):
    def of_layer(i):
        prefix = f"layer_{i}."
        theirs = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        return {"lstm": lstm_params(theirs, "l0")}

    layers = {f"layer_{i}": of_layer(i) for i in range(3)}
    return {"embed": {"table": tensors["embed.weight"]}, **layers}


@pytest.mark.parity("ulmfit", "`torch.nn` LSTM, masks given")
@sources
def test_the_language_model_is_that_of_torch_in_logits_loss_and_every_gradient(load):
    tensors, inputs, expected = load("torch_awd_lstm")
    masks, calls = with_masks(inputs)
    tokens = jnp.asarray(inputs["tokens"])
    batch = {
        "tokens": tokens,
        "positions": jnp.zeros_like(tokens),
        "targets": jnp.asarray(inputs["targets"]),
        "segment_ids": jnp.asarray(inputs["segment_ids"]),
        "mask": jnp.ones(tokens.shape, bool),
    }
    objective = loss_fn(ULMFiT(CONFIG), PenaltyConfig(activation=2.0, slowness=1.0), train=True)

    @jax.jit
    def results(tensors):
        def loss(tensors):
            params = {"encoder": encoder_params(tensors), "bias": tensors["head.bias"]}
            with masks:
                return objective(params, {}, batch, jax.random.key(0))[0]

        return jax.value_and_grad(loss)(tensors)

    loss, gradients = results(tensors)
    assert calls.total() == 8  # 2 of them between layers
    assert_close(loss, expected["loss"], 1e-4, "loss")
    assert {f"grad.{n}" for n in gradients} == {n for n in expected if n.startswith("grad.")}
    for name, gradient in gradients.items():
        assert_close(gradient, expected[f"grad.{name}"], 1e-4, name, "gradients")

    masks, _ = with_masks(inputs)

    @jax.jit
    def scores(tensors):
        params = {"encoder": encoder_params(tensors), "bias": tensors["head.bias"]}
        with masks:
            return ULMFiT(CONFIG).apply(
                {"params": params}, tokens, segment_ids=batch["segment_ids"], train=True
            )[0]

    logits = scores(tensors)
    assert_close(logits, expected["logits"], 1e-4, "logits")


@pytest.mark.parity("ulmfit", "`torch.nn` LSTM, BatchNorm1d, masks given")
@sources
def test_the_classifier_is_that_of_torch_in_logits_statistics_and_every_gradient(load):
    tensors, inputs, expected = load("torch_ulmfit")
    masks, calls = with_masks(inputs)
    tokens, rows = jnp.asarray(inputs["tokens"]), len(inputs["tokens"])
    mask = lengths_to_mask(inputs["lengths"], tokens.shape[1])
    widths = (15, 6)
    counted = {
        f"block_{i}": {"norm": {"mean": jnp.zeros(n), "var": jnp.ones(n)}}
        for i, n in enumerate(widths)
    }

    @jax.jit
    def results(tensors):
        def loss(tensors):
            head = {
                f"block_{i}": {
                    "norm": {
                        "scale": tensors[f"norm_{i}.weight"],
                        "bias": tensors[f"norm_{i}.bias"],
                    },
                    "linear": {
                        "kernel": tensors[f"linear_{i}.weight"].T,
                        "bias": tensors[f"linear_{i}.bias"],
                    },
                }
                for i in range(2)
            }
            with masks:
                logits, changed = Classifier(CONFIG).apply(
                    {
                        "params": {"encoder": encoder_params(tensors), **head},
                        "batch_stats": counted,
                    },
                    tokens,
                    mask,
                    train=True,
                    mutable=["batch_stats"],
                )
            return jnp.sum(inputs["cotangent"] * logits), (logits, changed["batch_stats"])

        return jax.grad(loss, has_aux=True)(tensors)

    gradients, (logits, changed) = results(tensors)
    assert calls.total() == 10
    assert_close(logits, expected["logits"], 1e-4, "logits")
    for i in range(2):
        norm = changed[f"block_{i}"]["norm"]
        assert_close(norm["mean"], expected[f"norm_{i}.mean"], 1e-4, "mean")
        # torch counts the variance of a batch with rows - 1, and 0.9 of the 1 that it began with.
        unbiased = 0.9 + (norm["var"] - 0.9) * rows / (rows - 1)
        assert_close(unbiased, expected[f"norm_{i}.var"], 1e-4, "var")
    # What is added before a norm of the batch changes nothing: the gradient is rounding.
    largest = max(np.abs(x).max() for n, x in expected.items() if n.startswith("grad."))
    for name, gradient in gradients.items():
        if np.abs(expected[f"grad.{name}"]).max() < 1e-5 * largest:
            assert np.abs(gradient).max() < 1e-5 * largest, name
        else:
            assert_close(gradient, expected[f"grad.{name}"], 1e-4, name, "gradients")


def test_a_pool_is_the_last_the_largest_and_the_mean_of_the_real_tokens():
    hidden = jax.random.normal(jax.random.key(0), (3, 5, 4))
    mask = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0]], bool)
    for row, real, pooled in zip(hidden, mask, concat_pooled(hidden, mask), strict=True):
        kept = np.asarray(row)[np.asarray(real)]
        expected = np.concatenate([kept[-1], kept.max(0), kept.mean(0)])
        np.testing.assert_allclose(pooled, expected, rtol=1e-6)
