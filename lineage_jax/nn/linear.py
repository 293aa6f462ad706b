"""Linear maps: the matrix products that are nearly all of a Transformer's time."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.typing import Array, DTypeLike, Float


@jax.custom_vjp
def project(x: Float[Array, "*batch M"], kernel: Float[Array, "M N"]) -> Float[Array, "*batch N"]:
    """The product x W over the last axis of x; its gradients are g W^T and x^T g."""
    return x @ kernel


def project_forward(x, kernel):
    return x @ kernel, (x, kernel)


def project_backward(saved, grad):
    x, kernel = saved
    kernel_grad = jax.lax.platform_dependent(
        x, grad, cpu=cpu_kernel_grad, default=plain_kernel_grad
    )
    return (grad @ kernel.T).astype(x.dtype), kernel_grad.astype(kernel.dtype)


def plain_kernel_grad(
    x: Float[Array, "*batch M"], grad: Float[Array, "*batch N"]
) -> Float[Array, "M N"]:
    """The product x^T g, summed over the batch."""
    batch = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, grad, ((batch, batch), ((), ())))


def cpu_kernel_grad(
    x: Float[Array, "*batch M"], grad: Float[Array, "*batch N"]
) -> Float[Array, "M N"]:
    """The same, as two steps: a transposed copy of one factor, and a plain product.

    Left alone, XLA's CPU backend copies the wider factor too, or multiplies both transposed, at
    half the speed. The barriers keep it from folding the copy back into the product. Copying x
    moves R M numbers; copying g, and then the product g^T x, moves (R + M) N.
    """
    held = jax.lax.optimization_barrier
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    (num_rows, width_in), width_out = x.shape, grad.shape[1]
    if num_rows * width_in <= (num_rows + width_in) * width_out:
        return held(held(x.T) @ grad)
    return held(held(grad.T) @ x).T


project.defvjp(project_forward, project_backward)


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
        kernel: Any = self.param(
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
            bias: Any = self.param(
                "bias",
                nn.with_logical_partitioning(
                    nn.initializers.zeros, tuple(self.axes[len(self.inputs) :])
                ),
                tuple(self.outputs),
                self.param_dtype,
            )
            y += bias.astype(self.dtype).reshape((1,) * len(batch) + (width_out,))
        return y.reshape(*batch, *self.outputs)
