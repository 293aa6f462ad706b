"""Linear maps: the matrix products that are nearly all of a Transformer's time."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.typing import Array, DTypeLike, Float


def project(x: Float[Array, "*batch M"], kernel: Float[Array, "M N"]) -> Float[Array, "*batch N"]:
    """The product x W over the last axis of x."""
    return x @ kernel


class Linear(nn.Module):
    """y = x W + b, from the last `len(inputs)` axes of x to the axes `outputs`.

    The kernel has shape (*inputs, *outputs), so a head is an axis of its own, to be sharded by
    name; the product itself is one matrix multiplication.

    Attributes:
      inputs: extent of each axis that is contracted.
      outputs: extent of each axis that comes out.
      axes: logical names of the kernel's axes, inputs first.
      stddev: standard deviation of the normal initialiser.
    """

    inputs: Sequence[int]
    outputs: Sequence[int]
    axes: Sequence[str]
    stddev: float
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.normal(self.stddev), tuple(self.axes)),
            (*self.inputs, *self.outputs),
            self.param_dtype,
        )
        width_in, width_out = math.prod(self.inputs), math.prod(self.outputs)
        batch = x.shape[: x.ndim - len(self.inputs)]
        y = project(
            x.astype(self.dtype).reshape(*batch, width_in),
            kernel.astype(self.dtype).reshape(width_in, width_out),
        )
        if self.use_bias:
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(
                    nn.initializers.zeros, tuple(self.axes[len(self.inputs) :])
                ),
                tuple(self.outputs),
                self.param_dtype,
            )
            y += bias.astype(self.dtype).reshape((1,) * len(batch) + (width_out,))
        return y.reshape(*batch, *self.outputs)
