"""The gated layer is its equation, and its products are sharded as the plain one's."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lineage_jax.nn import GatedMLP


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
