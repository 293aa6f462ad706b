"""Rotated heads are complex numbers turned, and their products know distance alone."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax import sharding
from lineage_jax.nn import RopeScaling, rotary, rotate
from lineage_jax.sharding import MeshConfig
from tests.nn.closeness import assert_same

ROWS, LENGTH, HEADS = 2, 7, 3


def some_heads(head_dim, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((ROWS, LENGTH, HEADS, head_dim)), jnp.float32)


def turned(heads, positions, base):
    """Component i + K / 2 as the imaginary part of component i, in float64."""
    heads, half = np.asarray(heads, np.float64), heads.shape[-1] // 2
    numbers = heads[..., :half] + 1j * heads[..., half:]
    angles = np.asarray(positions)[..., None, None] * base ** (-2 * np.arange(half) / (2 * half))
    numbers = numbers * np.exp(1j * angles)
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


@pytest.mark.parametrize(("head_dim", "base"), [(2, 10_000.0), (6, 10_000.0), (64, 500_000.0)])
def test_each_pair_is_a_complex_number_that_turns(head_dim, base):
    heads = some_heads(head_dim)
    positions = jnp.asarray(np.random.default_rng(1).integers(0, 100, (ROWS, LENGTH)), jnp.int32)
    found = jax.jit(rotate, static_argnums=2)(heads, positions, base)
    # An angle below 128 is rounded to 2^-18 of a radian; components are below 4.
    np.testing.assert_allclose(found, turned(heads, positions, base), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (None, (2, 128, 3, 128)),
        (MeshConfig(data=1, fsdp=2, tensor=2), (2, 384, 6, 128)),
        (MeshConfig(data=1, context=2, tensor=2), (1, 256, 20, 256)),
    ],
)
def test_the_kernel_turns_heads_and_gradients_as_everywhere_else(mesh, shape):
    heads, grad = jax.random.normal(jax.random.key(0), (2, *shape))
    positions = jax.random.randint(jax.random.key(1), shape[:2], 0, 100)

    def results(rotate):
        turned, back = jax.vjp(rotate, heads)
        return turned, *back(grad)

    def by_kernel(heads):
        assert rotary.comes_in_blocks(heads)
        rates = 10_000.0 ** -(np.arange(0, shape[-1], 2) / shape[-1])
        return rotary.turned(heads, *rotary.angles(positions, rates))

    expected = jax.jit(results, static_argnums=0)(lambda heads: rotate(heads, positions, 10_000.0))
    place = contextlib.nullcontext()
    if mesh is not None:
        place = sharding.use(sharding.make_mesh(mesh, jax.devices()[:4]))
    with place:
        assert_same(jax.jit(results, static_argnums=0)(by_kernel), expected)


@pytest.mark.parametrize("shape", [(2, 128, 3, 64), (2, 130, 3, 128), (3, 128, 3, 128)])
def test_other_heads_are_not_for_the_kernel(shape):
    with sharding.use(sharding.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])):
        assert not rotary.comes_in_blocks(jnp.zeros(shape))


def test_far_positions_turn_by_their_angle_as_float32_has_it():
    heads = some_heads(8)
    positions = jnp.asarray([[0, 1, 1000, 2047, 4095, 8191, 16383]])
    found = rotate(heads, positions, 10_000.0)
    # An angle below 2^14 is rounded to 2^-11 of a radian, but for the first pair's: integers.
    expected = turned(heads, positions, 10_000.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2**-11)
    np.testing.assert_allclose(found[..., ::4], expected[..., ::4], rtol=0, atol=1e-5)


def test_position_zero_is_left_as_it_is():
    heads = some_heads(6)
    zeros = jnp.zeros((1, LENGTH), jnp.int32)
    np.testing.assert_array_equal(rotate(heads, zeros, 10_000.0), heads)


def test_turning_keeps_the_length_of_each_pair():
    heads = some_heads(6)
    found = rotate(heads, 17 * jnp.arange(LENGTH)[None], 10_000.0)

    def lengths(x):
        return np.hypot(x[..., :3], x[..., 3:])

    np.testing.assert_allclose(lengths(found), lengths(heads), rtol=1e-6)


@pytest.mark.parametrize("shift", [1, 5, 50])
def test_scores_depend_on_relative_position_alone(shift):
    query, keys = some_heads(16, seed=2), some_heads(16, seed=3)

    @jax.jit
    def scores(first):
        index = first + jnp.arange(LENGTH)[None]
        turned = (rotate(x, index, 10_000.0) for x in (query, keys))
        return jnp.einsum("bthk,bshk->bhts", *turned) / 4

    found, expected = scores(shift), scores(0)
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)
    assert float(jnp.abs(scores(0) - jnp.einsum("bthk,bshk->bhts", query, keys) / 4).max()) > 0.1


def test_half_precision_is_rounded_once():
    heads = some_heads(6).astype(jnp.bfloat16)
    positions = 9 * jnp.arange(LENGTH)[None]
    found = rotate(heads, positions, 10_000.0)
    assert found.dtype == jnp.bfloat16
    expected = turned(heads, positions, 10_000.0)
    # One rounding, of the result, to 8 bits (2^-8 at the most), and float32's own.
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)


def test_interpolated_positions_are_positions_divided():
    heads, index = some_heads(8), jnp.arange(LENGTH)[None]
    slowed = rotate(heads, 4 * index, 10_000.0, RopeScaling(factor=4.0))
    np.testing.assert_allclose(slowed, rotate(heads, index, 10_000.0), rtol=0, atol=1e-5)


def test_llama_3_slows_the_pairs_that_turn_slowly_and_no_others():
    rates = 500_000.0 ** -(np.arange(64) / 64)
    ratio = RopeScaling(factor=8.0, trained_len=8192)(rates) / rates
    turns = rates * 8192 / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns >= 4], 1, rtol=1e-12)
    np.testing.assert_allclose(ratio[turns <= 1], 1 / 8, rtol=1e-12)
    between = (turns > 1) & (turns < 4)
    assert between.any() and (turns >= 4).any() and (turns <= 1).any()
    # Linear in the number of turns, from an eighth of the pace at 1 to all of it at 4.
    np.testing.assert_allclose(ratio[between], 1 / 8 + 7 / 8 * (turns[between] - 1) / 3, rtol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(factor=0.0), "factor must be above 0, got 0.0"),
        (dict(slow_turns=4.0), "slow_turns=4.0 must be below fast_turns=4.0"),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**wrong)
