"""Tokens reach their experts and come home, whatever devices the experts live on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lineage_jax import sharding
from lineage_jax.nn.experts import at_experts, buckets
from lineage_jax.sharding import MeshConfig
from tests.nn.closeness import assert_same

ROWS, LENGTH, WIDTH, HIDDEN = 8, 5, 3, 7


def test_a_bucket_holds_its_tokens_in_their_order_and_drops_the_last():
    tokens, filled = buckets(jnp.asarray([2, 0, 2, 2, 0]), 4, 2)
    np.testing.assert_array_equal(filled, [[1, 1], [0, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(tokens[jnp.asarray([0, 2])], [[1, 4], [0, 2]])


def compute(weights, x):
    up, down = weights
    return jnp.einsum("ech,ehd->ecd", jnp.tanh(jnp.einsum("ecd,edh->ech", x, up)), down)


def problem(num_experts):
    keys = jax.random.split(jax.random.key(0), 4)
    up = jax.random.normal(keys[0], (num_experts, WIDTH, HIDDEN))
    down = jax.random.normal(keys[1], (num_experts, HIDDEN, WIDTH))
    x = jax.random.normal(keys[2], (ROWS, LENGTH, WIDTH))
    return (up, down), x, jax.random.randint(keys[3], (ROWS, LENGTH), 0, num_experts)


def one_by_one(weights, x, choice):
    """Every token through every expert, and its own taken."""
    flat = x.reshape(1, -1, WIDTH)
    experts = weights[0].shape[0]
    all_of_them = compute(weights, jnp.broadcast_to(flat, (experts, *flat.shape[1:])))
    own = all_of_them[choice.reshape(-1), jnp.arange(flat.shape[1])]
    return own.reshape(x.shape)


@pytest.mark.parametrize(
    ("config", "num_experts"),
    [
        (MeshConfig(), 4),
        (MeshConfig(data=2, expert=4), 4),
        (MeshConfig(data=1, expert=8), 8),
        (MeshConfig(data=1, expert=2, fsdp=2, tensor=2), 6),
        (MeshConfig(data=1, expert=4, fsdp=2), 12),
    ],
)
def test_outputs_and_gradients_are_those_of_each_tokens_own_expert(config, num_experts):
    weights, x, choice = problem(num_experts)

    def results(run):
        def loss(weights, x):
            out = run(weights, x, choice)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(weights, x)

    def run(weights, x, choice):
        return at_experts(
            compute, weights, x, choice, num_experts=num_experts, capacity=ROWS * LENGTH
        )

    expected = results(one_by_one)
    mesh = sharding.make_mesh(config)
    x = jax.device_put(x, NamedSharding(mesh, P(sharding.RULES["batch"])))
    with sharding.use(mesh):
        actual = results(run)
    assert_same(actual, expected)


def test_a_token_that_its_full_bucket_drops_comes_home_as_zeros():
    weights, x, _ = problem(4)
    out = at_experts(
        compute, weights, x[:1], jnp.zeros((1, LENGTH), jnp.int32), num_experts=4, capacity=2
    )
    assert (np.abs(out[0, :2]).sum(-1) > 0).all() and not np.asarray(out[0, 2:]).any()
