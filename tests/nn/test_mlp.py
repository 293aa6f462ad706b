"""The gated layer is its equation, and its products are sharded as the plain one's."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lineage_jax.nn import GatedMLP, exact_gelu


def test_the_gated_layer_is_equation_6_in_outputs_and_gradients():
    mlp = GatedMLP(11, nn.silu, stddev=0.5, out_stddev=0.5)
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    params = nn.unbox(mlp.init(jax.random.key(1), x)["params"])

    def plain(params, x):
        gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
        gated = x @ gate
        return (gated / (1 + jnp.exp(-gated)) * (x @ up)) @ down

    def results(run):
        def loss(params, x):
            out = run(params, x)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

    found = results(lambda params, x: mlp.apply({"params": params}, x))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(results(plain)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_gated_layer_has_three_kernels_that_name_their_axes_and_no_bias():
    x = jnp.zeros((1, 1, 5))
    params = GatedMLP(11, nn.silu, 0.02, 0.02).init(jax.random.key(0), x)["params"]
    names = {name: layer["kernel"].names for name, layer in params.items()}
    assert names == {"gate": ("embed", "mlp"), "up": ("embed", "mlp"), "down": ("mlp", "embed")}
    assert all(set(layer) == {"kernel"} for layer in params.values())


def test_the_exact_gelu_and_its_gradient_are_jax_s():
    x = jnp.linspace(-6, 6, 1001)
    expected = jax.vmap(jax.value_and_grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    found = jax.vmap(jax.value_and_grad(exact_gelu))(x)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert exact_gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_exact_gelu_has_a_gradient_where_an_axis_is_split_by_hand():
    mesh = jax.make_mesh((2,), ("stage",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    x = jnp.linspace(-3, 3, 8).reshape(2, 4)

    def gradient(x):
        return jax.grad(lambda x: exact_gelu(x).sum())(x)

    split = jax.shard_map(gradient, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"})
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(split)(x), gradient(x), rtol=1e-6)
