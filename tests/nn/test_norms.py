"""Norms are their formulas, in float32 whatever comes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.nn import LayerNorm, RMSNorm

EPSILON = 1e-2  # large enough to show


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * scale + bias


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale


def arrays(shape, seed=0):
    """An input, a scale and a bias."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in (shape, shape[-1:], shape[-1:])]


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 1, 5), (3, 4, 5)])
def test_each_norm_is_its_formula(shape):
    x, scale, bias = arrays(shape)
    for norm, formula, given in (
        (LayerNorm, layer_norm, dict(scale=scale, bias=bias)),
        (RMSNorm, rms_norm, dict(scale=scale)),
    ):
        params = {name: jnp.asarray(value, jnp.float32) for name, value in given.items()}
        found = jax.jit(norm(EPSILON).apply)({"params": params}, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(found, formula(x, **given), rtol=1e-5, atol=1e-6)


def test_statistics_of_bfloat16_are_float32():
    x, scale, _ = arrays((4, 96))
    x = jnp.asarray(100 * x, jnp.bfloat16)
    norm = RMSNorm(EPSILON, dtype=jnp.bfloat16)
    found = norm.apply({"params": {"scale": jnp.asarray(scale, jnp.float32)}}, x)
    assert found.dtype == jnp.bfloat16
    expected = rms_norm(np.asarray(x, np.float64), scale)
    # One rounding, of the result, to 8 bits (2^-8 at the most), and float32's own.
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8 + 1e-6)


def test_rms_norm_has_a_scale_alone_and_starts_at_one():
    x = jnp.ones((2, 3))
    params = RMSNorm().init(jax.random.key(0), x)["params"]
    assert set(params) == {"scale"} and params["scale"].names == ("embed_vector",)
    np.testing.assert_array_equal(params["scale"].unbox(), 1.0)
