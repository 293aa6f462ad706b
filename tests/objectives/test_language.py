"""The cross-entropy of the next token, against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.objectives.language import next_token_loss


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (3, 7, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (3, 7))
    mask = rng.random((3, 7)) < 0.6
    return jnp.asarray(logits), jnp.asarray(targets, jnp.int32), jnp.asarray(mask)


def definition(logits, targets):
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(p, np.asarray(targets)[..., None], -1)[..., 0])


def cost(logits, target):
    """The loss of one token."""
    one = jnp.ones((1, 1), bool)
    return next_token_loss(jnp.asarray(logits)[None, None], jnp.full((1, 1), target), one)[0]


def test_a_token_costs_minus_the_log_of_its_probability(data):
    logits, targets, _ = data
    found = jax.vmap(jax.vmap(cost))(logits, targets)
    np.testing.assert_allclose(found, definition(logits, targets), rtol=1e-6, atol=1e-6)


def test_the_loss_is_the_mean_over_kept_tokens_and_comes_as_sum_and_count(data):
    logits, targets, mask = data
    kept = np.asarray(mask)
    loss, metrics = next_token_loss(logits, targets, mask)
    expected = definition(logits, targets)[kept]
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (expected.sum(), kept.sum()), rtol=1e-6)
    right = (np.asarray(logits).argmax(-1) == np.asarray(targets))[kept]
    assert tuple(map(float, metrics["accuracy"])) == (right.sum(), kept.sum())


def test_the_gradient_is_softmax_minus_one_hot_of_kept_tokens_alone(data):
    logits, targets, mask = data
    gradient = jax.grad(lambda x: next_token_loss(x, targets, mask)[0])(logits)
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(targets, 11)) * mask[..., None] / mask.sum()
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-7)
    assert (np.asarray(gradient)[~np.asarray(mask)] == 0).all()


def test_a_batch_that_keeps_nothing_has_a_loss_and_a_gradient_of_zero(data):
    logits, targets, mask = data
    none = jnp.zeros_like(mask)
    loss, metrics = next_token_loss(logits, targets, none)
    assert float(loss) == 0 and float(metrics["loss"][1]) == 0
    assert not jax.grad(lambda x: next_token_loss(x, targets, none)[0])(logits).any()


def test_large_logits_neither_overflow_nor_lose_the_loss():
    assert cost([1e4, 0.0, -1e4], 0) == 0
    assert cost([1e4, 0.0, -1e4], 2) == 2e4


def test_bfloat16_logits_are_summed_in_float32(data):
    logits, targets, mask = data
    low = logits.astype(jnp.bfloat16)
    loss, _ = next_token_loss(low, targets, mask)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, definition(low, targets)[np.asarray(mask)].mean(), rtol=1e-6)
