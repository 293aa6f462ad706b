import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lineage_jax import sharding
from lineage_jax.nn import Attention, KVCache, Mask, dot_product_attention
from lineage_jax.nn.attention import attend
from lineage_jax.sharding import MeshConfig

BATCH, QUERIES, KEYS, WIDTH = 2, 5, 7, 3


def heads(num_heads, num_groups):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (BATCH, QUERIES, num_heads, WIDTH)),
        jax.random.normal(keys[1], (BATCH, KEYS, num_groups, WIDTH)),
        jax.random.normal(keys[2], (BATCH, KEYS, num_groups, WIDTH)),
    )


def some_mask():
    mask = np.random.default_rng(0).random((BATCH, 1, QUERIES, KEYS)) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


def some_bias(num_heads, rows=BATCH):
    return jax.random.normal(jax.random.key(3), (rows, num_heads, QUERIES, KEYS))


def head_by_head(query, keys, values, mask, bias=None):
    """Equation 1, one row and one head at a time."""
    group_size = query.shape[2] // keys.shape[2]
    rows = []
    for row in range(BATCH):
        columns = []
        for head in range(query.shape[2]):
            group = head // group_size
            scores = query[row, :, head] @ keys[row, :, group].T / np.sqrt(WIDTH)
            if bias is not None:
                scores += bias[row % len(bias), head]
            unscaled = jnp.where(mask[row, 0], jnp.exp(scores), 0.0)
            weights = unscaled / unscaled.sum(-1, keepdims=True)
            columns.append(weights @ values[row, :, group])
        rows.append(jnp.stack(columns, axis=1))
    return jnp.stack(rows)


@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 4), (4, 2), (4, 1), (6, 2), (1, 1)])
def test_outputs_and_gradients_are_those_of_equation_1_head_by_head(num_heads, num_groups):
    arguments, mask = heads(num_heads, num_groups), some_mask()

    def run(attention):
        def loss(*arguments):
            out = attention(*arguments, mask)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arguments)

    for actual, expected in zip(
        jax.tree.leaves(run(dot_product_attention)), jax.tree.leaves(run(head_by_head)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 4), (6, 2)])
def test_a_bias_is_added_to_each_head_s_scores_and_has_its_gradient(num_heads, num_groups, rows):
    arguments, mask = heads(num_heads, num_groups), some_mask()
    bias = some_bias(num_heads, rows)

    def run(attention):
        def loss(query, keys, values, bias):
            out = attention(query, keys, values, mask, bias=bias)
            return jnp.sum(jnp.sin(out)), out

        run = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
        return run(*arguments, bias)

    for actual, expected in zip(
        jax.tree.leaves(run(dot_product_attention)), jax.tree.leaves(run(head_by_head)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_self_attention_with_a_bias_reads_by_it_and_shows_it_in_its_weights():
    attention = Attention(num_heads=4, num_kv_heads=2, head_dim=3, stddev=0.5, out_stddev=0.5)
    x, index = jax.random.normal(jax.random.key(1), (BATCH, KEYS, 6)), jnp.arange(KEYS)[None]
    mask = Mask(index, index)
    variables = nn.unbox(attention.init(jax.random.key(2), x, mask, index))
    # So much is the first key worth to every head that nothing else is read.
    bias = jnp.zeros((1, 4, KEYS, KEYS)).at[..., 0].set(1e4)

    @jax.jit
    def run(bias):
        return attention.apply(variables, x, mask, index, bias=bias, mutable=["intermediates"])

    (out, _), found = run(bias)
    (weights,) = found["intermediates"]["weights"]
    first = jnp.zeros((BATCH, 4, KEYS, KEYS)).at[..., 0].set(1.0)
    np.testing.assert_array_equal(weights, first)
    np.testing.assert_allclose(out, jnp.repeat(out[:, :1], KEYS, axis=1), rtol=1e-5, atol=1e-6)
    (without, _), _ = run(jnp.zeros_like(bias))
    expected, _ = attention.apply(variables, x, mask, index)
    np.testing.assert_allclose(without, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out[:, 0], expected[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_a_bias_is_added_where_the_mesh_splits_the_sequence_or_the_heads(axis):
    query, keys, values = (jax.random.normal(jax.random.key(i), (8, 8, 4, WIDTH)) for i in range(3))
    bias, index = jax.random.normal(jax.random.key(3), (1, 4, 8, 8)), jnp.arange(8)[None]
    mask = Mask(index, index)
    expected = dot_product_attention(query, keys, values, mask.dense(), bias=bias)
    run = jax.jit(lambda *arguments: attend(*arguments, mask, bias=bias))
    with sharding.use(sharding.make_mesh(MeshConfig(**{axis: 4}))):
        out = run(query, keys, values)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_may_read_nothing_gets_the_average_value():
    query, keys, values = heads(4, 2)
    mask = some_mask().at[0, 0, 1].set(False)
    out = dot_product_attention(query, keys, values, mask)
    average = jnp.repeat(values.mean(1), 2, axis=1)
    np.testing.assert_allclose(out[0, 1], average[0], rtol=1e-5, atol=1e-6)


def test_half_precision_stays_near_float32():
    arguments = heads(4, 2)
    expected = dot_product_attention(*arguments, some_mask())
    out = dot_product_attention(*(a.astype(jnp.bfloat16) for a in arguments), some_mask())
    assert out.dtype == jnp.bfloat16
    # Queries, keys, values, weights and the result are rounded to 2^-9 of themselves; values < 4.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=5 * 4 * 2**-9)


def test_reading_token_by_token_into_a_cache_is_reading_at_once():
    attention = Attention(num_heads=4, num_kv_heads=2, head_dim=3, stddev=0.5, out_stddev=0.5)
    x, index = jax.random.normal(jax.random.key(1), (BATCH, KEYS, 6)), jnp.arange(KEYS)[None]
    mask = Mask(index, index)
    variables = nn.unbox(attention.init(jax.random.key(2), x, mask, index))
    expected, _ = attention.apply(variables, x, mask, index)

    @jax.jit
    def read(token, position, cache):
        return attention.apply(variables, token, Mask(position, index), position, cache)

    cache = KVCache(*(jnp.zeros((BATCH, KEYS, 2, 3)) for _ in range(2)))
    for t in range(KEYS):
        out, cache = read(x[:, t : t + 1], jnp.full((BATCH, 1), t), cache)
        np.testing.assert_allclose(out[:, 0], expected[:, t], rtol=1e-5, atol=1e-6)
