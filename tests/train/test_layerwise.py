"""Rates fall with depth and rise and fall with time as printed; frozen layers wait, as if new."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lineage_jax.train.layerwise import LayerwiseConfig, layerwise_adam, slanted_triangular

RATES = (0.1, 0.05, 0.2, 0.1, 0.3)
ORDER = ("low", "middle", "top")


def depth(names):
    return ORDER[::-1].index(names[0])


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"low": (3, 2), "middle": (2,), "top": (2, 4)}
    return {name: {"kernel": jnp.float32(rng.normal(size=s))} for name, s in shapes.items()}


def changes(config):
    """What each of five updates adds to the parameters."""
    tx = layerwise_adam(config, depth)
    state, found = tx.init(tree(0)), []
    update = jax.jit(lambda grads, state, rate: tx.update(grads, state, learning_rate=rate))
    for seed, rate in enumerate(RATES, start=1):
        change, state = update(tree(seed), state, rate)
        found.append(change)
    return found


def of_adam(config, part, gradients, rates):
    """optax's, of one part alone."""
    adam, found = optax.scale_by_adam(config.b1, config.b2, config.epsilon), []
    state = adam.init(tree(0)[part])
    for grads, rate in zip(gradients, rates, strict=True):
        change, state = adam.update(grads[part], state)
        found.append(-rate * np.asarray(change["kernel"]))
    return found


def test_each_layer_has_adam_at_the_rate_above_it_over_2_6():
    config = LayerwiseConfig()
    found, gradients = changes(config), [tree(seed) for seed in range(1, 6)]
    for part, share in (("top", 1.0), ("middle", 1 / 2.6), ("low", 1 / 2.6**2)):
        for ours, theirs in zip(found, of_adam(config, part, gradients, RATES), strict=True):
            np.testing.assert_allclose(ours[part]["kernel"], share * theirs, rtol=1e-5)


def test_a_layer_waits_for_its_turn_and_begins_as_if_training_began_there():
    config = LayerwiseConfig(unfreeze_every=2, layer_decay=1.0)
    found, gradients = changes(config), [tree(seed) for seed in range(1, 6)]
    for part, first in (("top", 0), ("middle", 2), ("low", 4)):
        for waiting in found[:first]:
            assert (waiting[part]["kernel"] == 0).all()
        adam = of_adam(config, part, gradients[first:], RATES[first:])
        for ours, theirs in zip(found[first:], adam, strict=True):
            np.testing.assert_allclose(ours[part]["kernel"], theirs, rtol=1e-5)


def test_the_schedule_is_equation_3():
    config, num_steps = LayerwiseConfig(learning_rate=0.01), 100

    def printed(t, cut_frac=0.1, ratio=32):
        cut = int(num_steps * cut_frac)
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        return 0.01 * (1 + p * (ratio - 1)) / ratio

    for step in range(num_steps):
        assert slanted_triangular(config, step, num_steps) == pytest.approx(printed(step))
    assert slanted_triangular(config, 10, num_steps) == 0.01
    assert slanted_triangular(config, 0, num_steps) == pytest.approx(0.01 / 32)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 15, 1003])
def test_rates_of_any_length_lie_between_the_lowest_and_the_peak(num_steps):
    config = LayerwiseConfig()
    rates = [slanted_triangular(config, step, num_steps) for step in range(num_steps)]
    assert min(rates) >= config.learning_rate / 32 * (1 - 1e-12)
    assert max(rates) == pytest.approx(config.learning_rate)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(learning_rate=0.0), "learning_rate must be positive, got 0.0"),
        (dict(cut_fraction=1.0), r"cut_fraction must be in \[0, 1\), got 1.0"),
        (dict(unfreeze_every=-1), "unfreeze_every must be 0 or more, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LayerwiseConfig(**wrong)
