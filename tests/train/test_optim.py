"""AdamW is its paper's algorithm and optax's; schedules go where they say they go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lineage_jax.train.optim import (
    OptimizerConfig,
    adamw,
    decay_start,
    decays_weight,
    learning_rate,
)

CONFIG = OptimizerConfig(b1=0.8, b2=0.95, epsilon=1e-3, weight_decay=0.2)
RATES = (0.1, 0.05, 0.2)


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "dense": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)},
        "norm": {"scale": rng.normal(size=3), "bias": rng.normal(size=3)},
        "embed": {"table": rng.normal(size=(4, 3))},
    }


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.float32, tree(0))


@pytest.fixture(scope="module")
def gradients():
    return [jax.tree.map(jnp.float32, tree(seed)) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def trained(params, gradients):
    tx = adamw(CONFIG)
    state = tx.init(params)
    for grads, rate in zip(gradients, RATES, strict=True):
        updates, state = tx.update(grads, state, params, learning_rate=rate)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), ours, theirs)


def test_adamw_is_algorithm_2_with_decay_on_matrices_alone(params, gradients, trained):
    c = CONFIG

    def algorithm_2(path, theta, *gs):  # Loshchilov and Hutter 2019, in float64
        theta = np.asarray(theta, np.float64)
        decay = c.weight_decay if path[-1].key in ("kernel", "table") else 0.0
        m = v = np.zeros_like(theta)
        for t, (g, rate) in enumerate(zip(gs, RATES, strict=True), start=1):
            g = np.asarray(g, np.float64)
            m, v = c.b1 * m + (1 - c.b1) * g, c.b2 * v + (1 - c.b2) * g**2
            step = m / (1 - c.b1**t) / (np.sqrt(v / (1 - c.b2**t)) + c.epsilon)
            theta = theta - rate * (step + decay * theta)
        return theta

    expected = jax.tree_util.tree_map_with_path(algorithm_2, params, *gradients)
    assert_same(trained, expected)


def test_adamw_is_optax_adamw(params, gradients, trained):
    tx = optax.adamw(
        lambda step: jnp.asarray(RATES)[step],
        CONFIG.b1,
        CONFIG.b2,
        CONFIG.epsilon,
        weight_decay=CONFIG.weight_decay,
        mask=decays_weight,
    )
    state = tx.init(params)
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_same(trained, params)


def test_a_parameter_of_zero_gradient_decays_unless_it_is_a_scale_or_a_bias(params):
    tx = adamw(CONFIG)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, learning_rate=0.5)
    for name, moved in (("kernel", True), ("bias", False)):
        expected = -0.5 * 0.2 * moved * params["dense"][name]
        np.testing.assert_allclose(updates["dense"][name], expected, rtol=1e-6, atol=0)
    assert not updates["norm"]["scale"].any() and not updates["norm"]["bias"].any()


def rates(schedule, num_steps, **changes):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=10, **changes)
    return config, np.asarray([learning_rate(config, step, num_steps) for step in range(num_steps)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_warm_up_rises_linearly_to_the_peak_and_never_starts_at_zero(schedule):
    _, values = rates(schedule, 100)
    np.testing.assert_allclose(values[:10], 2.0 * np.arange(1, 11) / 10)
    assert values[10] == 2.0 == values.max()


def test_cosine_is_half_way_in_the_middle_and_ends_at_its_fraction_of_the_peak():
    config, values = rates("cosine", 110, final_fraction=0.1)
    assert values[60] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert (np.diff(values[10:]) < 0).all()
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)
    assert learning_rate(config, 500, 110) == pytest.approx(0.2)


def test_wsd_is_stable_then_decays_linearly_to_zero():
    config, values = rates("wsd", 100, decay_fraction=0.2)
    assert decay_start(config, 100) == 80
    assert (values[10:81] == 2.0).all()
    np.testing.assert_allclose(values[80:], 2.0 * (100 - np.arange(80, 100)) / 20)
    assert learning_rate(config, 100, 100) == 0


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 1.0])
def test_wsd_runs_of_two_lengths_agree_until_the_shorter_decays(fraction):
    config, short = rates("wsd", 60, decay_fraction=fraction)
    _, long = rates("wsd", 200, decay_fraction=fraction)
    agree = min(decay_start(config, 60) + 1, 60)  # at its first step a decay is still at the peak
    np.testing.assert_array_equal(short[:agree], long[:agree])
    if 0 < fraction < 1:
        assert (short[agree:] < long[agree:60]).all()


def test_constant_stays():
    _, values = rates("constant", 50)
    assert (values[10:] == 2.0).all()


def test_no_warm_up_starts_at_the_peak():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0)
    assert learning_rate(config, 0, 10) == 2.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(learning_rate=0.0), "learning_rate must be positive, got 0.0"),
        (dict(learning_rate=float("nan")), "learning_rate must be positive, got nan"),
        (dict(warmup_steps=-1), "warmup_steps must be 0 or more, got -1"),
        (dict(decay_fraction=1.5), r"decay_fraction must be in \[0, 1\], got 1.5"),
        (dict(final_fraction=-0.1), r"final_fraction must be in \[0, 1\], got -0.1"),
    ],
)
def test_settings_that_make_no_schedule_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)
