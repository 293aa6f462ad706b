"""Normalisation over the width of the residual stream."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.typing import Array, DTypeLike, Float


def without_ones(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same numbers without the axes of extent 1, but for the last axis.

    XLA's CPU backend sums products many times slower along with such an axis.
    """
    return x.reshape([n for n in x.shape[:-1] if n > 1] + [x.shape[-1]])


def normalize(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    """(x - mean) / sqrt(variance + epsilon) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def vector(
    norm: nn.Module, name: str, init: nn.initializers.Initializer, x: Float[Array, "... D"]
) -> Float[Array, "... D"]:
    """A parameter of the norm, as wide as x, in float32 and with as many axes as x."""
    init = nn.with_logical_partitioning(init, ("embed_vector",))
    value: Any = norm.param(name, init, x.shape[-1:], norm.param_dtype)
    return value.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + x.shape[-1:])


class LayerNorm(nn.Module):
    """Layer normalisation with a learned scale and bias (Ba et al. 2016, equation 4)."""

    epsilon: float = 1e-5  # torch.nn.LayerNorm, and every released GPT
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        shape, x = x.shape, without_ones(x)
        scale = vector(self, "scale", nn.initializers.ones, x)
        bias = vector(self, "bias", nn.initializers.zeros, x)
        return (normalize(x, self.epsilon) * scale + bias).astype(self.dtype).reshape(shape)


class RMSNorm(nn.Module):
    """Normalisation by the root mean square, with a learned scale (Zhang and Sennrich 2019, eq. 4).

    x / sqrt(mean(x^2) + epsilon) over the last axis, in float32: LayerNorm without its mean and
    bias.
    """

    epsilon: float = 1e-5  # of Llama 2 as released
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        shape, x = x.shape, without_ones(x)
        scale = vector(self, "scale", nn.initializers.ones, x)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype).reshape(shape)
