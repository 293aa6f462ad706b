"""A table looks ids up and scores hidden states, in the precision it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.nn.embed import inner_products


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 48), (67, 48), (2, 5, 67))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_scores_and_their_gradients_are_those_of_the_plain_product(arrays):
    x, table, grad = arrays
    found, pullback = jax.vjp(jax.jit(inner_products), x, table)
    expected, plain = jax.vjp(lambda x, table: x @ table.T, x, table)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(pullback(grad), plain(grad), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_scores_of_bfloat16_states_are_not_rounded_to_bfloat16(arrays):
    x, table = (a.astype(jnp.bfloat16) for a in arrays[:2])
    found = jax.jit(inner_products)(x, table)
    exact = np.einsum("btd,vd->btv", np.asarray(x, np.float64), np.asarray(table, np.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    dx, dtable = jax.vjp(inner_products, x, table)[1](found)
    assert dx.dtype == dtable.dtype == jnp.bfloat16
