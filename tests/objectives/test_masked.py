"""What was left out and whether a pair is one, and what a student learns, against definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.objectives.distillation import cosine_loss, distillation_loss, student_loss
from lineage_jax.objectives.masked import masked_token_loss, pretraining_loss

B, T, V, D = 3, 7, 11, 5


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    arrays = {
        "logits": rng.normal(0, 3, (B, T, V)),
        "teacher_logits": rng.normal(0, 3, (B, T, V)),
        "hidden": rng.normal(0, 1, (B, T, D)),
        "teacher_hidden": rng.normal(0, 1, (B, T, D)),
        "pair_logits": rng.normal(0, 1, (B, 2)),
    }
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    arrays["targets"] = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    arrays["target_mask"] = jnp.asarray(rng.random((B, T)) < 0.3)
    arrays["mask"] = jnp.asarray(rng.random((B, T)) < 0.7)
    arrays["label"] = jnp.asarray([1, 0, 1], jnp.int32)
    return arrays


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_pretraining_is_the_mean_of_chosen_tokens_and_the_mean_of_pairs(data):
    names = ("logits", "pair_logits", "targets", "target_mask", "label")
    loss, metrics = jax.jit(pretraining_loss)(*(data[name] for name in names))
    chosen, targets = np.asarray(data["target_mask"]), np.asarray(data["targets"])
    log_p = np.take_along_axis(log_softmax(data["logits"]), targets[..., None], -1)[..., 0]
    pairs = log_softmax(data["pair_logits"])[np.arange(B), np.asarray(data["label"])]
    np.testing.assert_allclose(loss, -log_p[chosen].mean() - pairs.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (-log_p[chosen].sum(), chosen.sum()), rtol=1e-5)
    np.testing.assert_allclose(metrics["pair_loss"], (-pairs.sum(), B), rtol=1e-5)
    right = (np.asarray(data["pair_logits"]).argmax(-1) == data["label"]).sum()
    np.testing.assert_array_equal(metrics["pair_accuracy"], (right, B))


def test_rows_that_are_no_pair_do_not_count(data):
    names = ("logits", "pair_logits", "targets", "target_mask", "label")
    given = [data[name] for name in names]
    kept = jnp.asarray([True, False, True])
    loss, metrics = jax.jit(pretraining_loss)(*given, kept)
    changed = [x if i != 1 else x.at[1].set(9.0) for i, x in enumerate(given)]
    assert loss == jax.jit(pretraining_loss)(*changed, kept)[0]
    assert metrics["pair_loss"][1] == 2


def test_distillation_is_the_divergence_from_the_teacher_at_a_temperature(data):
    mask, temperature = np.asarray(data["mask"]), 3.0
    theirs = log_softmax(np.asarray(data["teacher_logits"]) / temperature)
    ours = log_softmax(np.asarray(data["logits"]) / temperature)
    divergence = (np.exp(theirs) * (theirs - ours)).sum(-1)
    loss = jax.jit(functools.partial(distillation_loss, temperature=temperature))
    found = loss(data["logits"], data["teacher_logits"], data["mask"])
    np.testing.assert_allclose(found, 9 * divergence[mask].mean(), rtol=1e-5)
    equal = loss(data["teacher_logits"], data["teacher_logits"] + 5.0, data["mask"])
    np.testing.assert_allclose(equal, 0, atol=1e-6)


def test_the_cosine_loss_sees_directions_alone(data):
    hidden, theirs, mask = data["hidden"], data["teacher_hidden"], data["mask"]
    loss = jax.jit(cosine_loss)
    a, b = (np.asarray(x, np.float64)[np.asarray(mask)] for x in (hidden, theirs))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(loss(hidden, theirs, mask), 1 - cosine.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss(3 * hidden, hidden, mask), 0, atol=1e-6)
    np.testing.assert_allclose(loss(-hidden, hidden, mask), 2, atol=1e-6)


def test_a_student_has_all_three_losses_and_its_teacher_no_gradient(data):
    names = ("logits", "hidden", "teacher_logits", "teacher_hidden")
    masks = (data["targets"], data["target_mask"], data["mask"])

    def loss(*given):
        return student_loss(*given, *masks, weights=(5.0, 2.0, 1.0))[0]

    given = [data[name] for name in names]
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    parts = [
        distillation_loss(given[0], given[2], data["mask"]),
        masked_token_loss(given[0], *masks[:2])[0],
        cosine_loss(given[1], given[3], data["mask"]),
    ]
    total, gradients = run(*given)
    expected = 5 * parts[0] + 2 * parts[1] + parts[2]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    of_logits, of_hidden, *of_teacher = (np.abs(x).max() for x in gradients)
    assert of_logits > 0 and of_hidden > 0 and not any(of_teacher)
