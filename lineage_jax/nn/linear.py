"""Linear maps: the matrix products that are nearly all of a Transformer's time."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lineage_jax.nn.split import mesh_axes, undivided
from lineage_jax.typing import Array, DTypeLike, Float

INNER, OUTER = "inner product", "outer product"
"""What a policy of `jax.checkpoint` calls the results of linear maps: within a layer (heads, the
feed-forward width), and back to the width of the residual stream."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(
    x: Float[Array, "*batch M"], kernel: Float[Array, "M N"], axes: tuple[str, str] | None = None
) -> Float[Array, "*batch N"]:
    """The product x W over the last axis of x; its gradients are g W^T and x^T g.

    Args:
      x, kernel: the factors.
      axes: logical names of W's, if one of them is "embed" (`scattered_kernel_grad`).
    """
    return x @ kernel


def project_forward(x, kernel, axes):
    return x @ kernel, (x, kernel)


def project_backward(axes, saved, grad):
    x, kernel = saved
    of_kernel = kernel_grad(x, grad) if axes is None else scattered_kernel_grad(x, grad, axes)
    return (grad @ kernel.T).astype(x.dtype), of_kernel.astype(kernel.dtype)


def kernel_grad(x: Float[Array, "*batch M"], grad: Float[Array, "*batch N"]) -> Float[Array, "M N"]:
    """The product x^T g, summed over the batch."""
    return jax.lax.platform_dependent(x, grad, cpu=cpu_kernel_grad, default=plain_kernel_grad)


def scattered_kernel_grad(
    x: Float[Array, "B T M"], grad: Float[Array, "B T N"], axes: tuple[str, str]
) -> Float[Array, "M N"]:
    """The same on a mesh, where each device keeps of the sum what it keeps of the kernel.

    Left to the compiler, a TPU's devices sum the whole gradient everywhere (an all-reduce), and
    then drop all but their share; a reduce-scatter sends half as much (Rajbhandari et al. 2020,
    "ZeRO", section 7.1, arXiv 1910.02054).

    Args:
      x, grad: split over the mesh's axes of rows and length.
      axes: logical names of the kernel's, one of them "embed".
    """
    rows, length, *sides = (mesh_axes(name) for name in ("batch", "length", *axes))
    shares, embed = mesh_axes("embed"), axes.index("embed")
    extents = [math.prod(one.values()) for one in (rows, length, *sides)]
    sizes = (x.shape[0], x.shape[1], x.shape[2], grad.shape[2])
    uneven = any(size % extent for size, extent in zip(sizes, extents, strict=True))
    if not shares or uneven or not set(shares) <= {*rows, *length}:
        return kernel_grad(x, grad)

    def local(x, grad):
        whole = kernel_grad(x, grad)
        replicas = tuple(axis for axis in (*rows, *length) if axis not in shares)
        if replicas:
            whole = jax.lax.psum(whole, replicas)
        return jax.lax.psum_scatter(whole, tuple(shares), scatter_dimension=embed, tiled=True)

    # Of the two factors one is as wide as the residual stream, and whole.
    across = [
        None if name == "embed" else tuple(side) for name, side in zip(axes, sides, strict=True)
    ]
    mapped = jax.shard_map(
        local,
        in_specs=tuple(P(tuple(rows), tuple(length), side) for side in across),
        out_specs=P(*(tuple(side) for side in sides)),
        axis_names={*rows, *length, *sides[1 - embed]},
    )
    return undivided(mapped)(x, grad)


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
        sides = (tuple(self.axes[: len(self.inputs)]), tuple(self.axes[len(self.inputs) :]))
        y = project(
            x.astype(self.dtype).reshape(*batch, width_in),
            kernel.astype(self.dtype).reshape(width_in, width_out),
            (sides[0][0], sides[1][0]) if len(batch) == 2 and ("embed",) in sides else None,
        )
        if self.use_bias:
            bias: Any = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.zeros, sides[1]),
                tuple(self.outputs),
                self.param_dtype,
            )
            y += bias.astype(self.dtype).reshape((1,) * len(batch) + (width_out,))
        return checkpoint_name(y, OUTER if sides[1] == ("embed",) else INNER).reshape(
            *batch, *self.outputs
        )
