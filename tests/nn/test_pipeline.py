"""A pipeline of stages is the stack of layers, in outputs and gradients, on any schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax import sharding
from lineage_jax.nn.linear import project
from lineage_jax.nn.pipeline import Schedule, pipeline, schedule
from lineage_jax.nn.split import on_each_device
from lineage_jax.sharding import MeshConfig
from tests.nn.closeness import assert_same

WIDTH, LENGTH = 3, 5


def layer(x, shared, weights, key):
    """Mixes each row with its own shift, so that a micro-batch with another's rows would show."""
    noise = 0.0 if key is None else jax.random.normal(key, (1, 1, WIDTH))
    return x + jnp.tanh(x @ weights + shared["shift"][:, :, None] + shared["bias"] + noise)


def problem(rows, depth):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (rows, LENGTH, WIDTH)),
        {
            "shift": jax.random.normal(keys[1], (rows, LENGTH)),
            "bias": jax.random.normal(keys[2], (1, 1, WIDTH)),
        },
        jax.random.normal(keys[3], (depth, WIDTH, WIDTH)),
    )


def in_turn(x, shared, weights):
    return jax.lax.scan(lambda x, w: (layer(x, shared, w, None), None), x, weights)[0]


def results(run, x, shared, weights):
    def loss(x, shared, weights):
        out = run(x, shared, weights)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, shared, weights)


@pytest.mark.parametrize(
    ("plan", "rows", "depth"),
    [
        (Schedule(2, 4, 1), 8, 4),
        (Schedule(4, 4, 1), 4, 4),
        (Schedule(4, 2, 1), 6, 8),  # fewer micro-batches than stages
        (Schedule(3, 5, 1), 15, 9),
        (Schedule(2, 3, 3), 9, 12),  # three rounds
        (Schedule(4, 4, 2), 4, 8),  # what comes back is due at once
        (Schedule(8, 9, 2), 9, 16),
    ],
)
def test_outputs_and_gradients_are_those_of_the_layers_in_turn(plan, rows, depth):
    arguments = problem(rows, depth)
    expected = results(in_turn, *arguments)
    config = MeshConfig(data=1, stage=plan.stages)
    with sharding.use(sharding.make_mesh(config, jax.devices()[: plan.stages])):
        actual = results(lambda *inputs: pipeline(layer, *inputs, None, plan, "stage"), *arguments)
    assert_same(actual, expected)


def per_device(function, *arrays):
    """As kernels are called, which know nothing of the mesh."""
    axes = ("batch", "length", None)
    return on_each_device(lambda *x: (function(*x),), arrays, (axes,) * len(arrays), (axes,))[0]


@jax.custom_vjp
def squared(x):
    return per_device(jnp.square, x)


squared.defvjp(
    lambda x: (squared(x), x),
    lambda x, grad: (per_device(lambda x, grad: 2 * x * grad, x, grad),),
)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_what_each_device_computes_alone_is_differentiated_between_products(fsdp):
    def layer(x, shared, weights, key, square=squared):
        shift = shared["shift"][:, :, None] + shared["bias"]
        return x + jnp.tanh(project(square(project(x, weights)), weights.T) / 8 + shift)

    def in_turn(x, shared, weights):
        for one in weights:
            x = layer(x, shared, one, None, jnp.square)
        return x

    arguments = problem(8, 4)
    expected = results(in_turn, *arguments)
    config, plan = MeshConfig(data=1, stage=2, fsdp=fsdp), Schedule(2, 4, 1)
    with sharding.use(sharding.make_mesh(config, jax.devices()[: 2 * fsdp])):
        actual = results(lambda *inputs: pipeline(layer, *inputs, None, plan, "stage"), *arguments)
    assert_same(actual, expected)


def test_each_layer_and_micro_batch_has_random_numbers_of_its_own():
    x, shared, weights = problem(4, 4)
    plan, zero = Schedule(2, 4, 1), jax.tree.map(jnp.zeros_like, (x, shared, weights))
    with sharding.use(sharding.make_mesh(MeshConfig(data=1, stage=2), jax.devices()[:2])):
        run = jax.jit(lambda *a: pipeline(layer, *a, jax.random.key(1), plan, "stage"))
        out = run(*zero)
        np.testing.assert_array_equal(out, run(*zero))
    assert len(np.unique(np.asarray(out[:, 0, 0]))) == 4


@pytest.mark.parametrize(
    ("stages", "num_layers", "rows", "plan"),
    [
        (4, 32, 64, Schedule(4, 16, 1)),  # enough rows: GPipe's rule
        (4, 32, 8, Schedule(4, 8, 2)),  # two rounds make up for it
        (4, 96, 6, Schedule(4, 6, 3)),
        (4, 4, 4, Schedule(4, 4, 1)),  # no more layers to go round for
        (8, 32, 4, Schedule(8, 4, 1)),
        (2, 6, 7, Schedule(2, 7, 3)),
    ],
)
def test_micro_batches_are_as_many_as_are_enough_and_rounds_make_up(stages, num_layers, rows, plan):
    assert schedule(stages, num_layers, rows) == plan


def test_the_idle_part_is_that_of_the_papers():
    assert Schedule(4, 16, 1).idle == 3 / 19
    assert Schedule(4, 4, 4).idle == 3 / 19
