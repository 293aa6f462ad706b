"""The position-wise feed-forward layer, plain and gated."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.nn.linear import Linear
from lineage_jax.typing import Array, DTypeLike, Float


@jax.custom_jvp
def exact_gelu(x: Array) -> Array:
    """x P(a standard normal is below x) (Hendrycks and Gimpel 2016, section 2, arXiv 1606.08415).

    The same as `jax.nn.gelu(x, approximate=False)`, of which jax 0.12 cannot take the gradient
    where an axis of the mesh is split by hand: of erf's derivative it makes a polynomial whose
    coefficients it then finds the same on all devices.
    """
    return x * normal_below(x)


@exact_gelu.defjvp
def exact_gelu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    below, density = normal_below(x), jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * below, (below + x * density) * tangent


def normal_below(x: Array) -> Array:
    """P(a standard normal is below x)."""
    return 0.5 * jax.lax.erfc(-math.sqrt(0.5) * x)


class MLP(nn.Module):
    """Two linear maps with a nonlinearity between (Vaswani et al. 2017, equation 2)."""

    mlp_dim: int
    activation: Callable[[Array], Array]
    stddev: float
    out_stddev: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        types: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        up = Linear((width,), (self.mlp_dim,), ("embed", "mlp"), self.stddev, name="up", **types)
        down = Linear(
            (self.mlp_dim,), (width,), ("mlp", "embed"), self.out_stddev, name="down", **types
        )
        # The backward pass recomputes what is between the two products: cheaper than to store it.
        activation = jax.checkpoint(self.activation, prevent_cse=False)
        return down(activation(up(x)))


class GatedMLP(nn.Module):
    """Two linear maps multiplied, one of them through a nonlinearity, and a third back.

    (f(x W) * x V) W2; with f the SiLU it is SwiGLU (Shazeer 2020, equation 6, arXiv 2002.05202). No
    bias, as there.
    """

    mlp_dim: int
    activation: Callable[[Array], Array]
    stddev: float
    out_stddev: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        types: dict[str, Any] = dict(use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        into, back = ("embed", "mlp"), ("mlp", "embed")
        gate = Linear((width,), (self.mlp_dim,), into, self.stddev, name="gate", **types)
        up = Linear((width,), (self.mlp_dim,), into, self.stddev, name="up", **types)
        down = Linear((self.mlp_dim,), (width,), back, self.out_stddev, name="down", **types)
        # As in MLP: cheaper to compute again than to store.
        gated = jax.checkpoint(lambda g, u: self.activation(g) * u, prevent_cse=False)
        return down(gated(grad_held(gate(x)), grad_held(up(x))))


@jax.custom_vjp
def grad_held(x: Array) -> Array:
    """The same, whose gradient is written down before what it goes into is computed.

    Two products read it. Fused into both, as a TPU's compiler would have it, what it is made of is
    computed twice, inside of the products, which wait for it.
    """
    return x


grad_held.defvjp(lambda x: (x, None), lambda _, grad: (jax.lax.optimization_barrier(grad),))
