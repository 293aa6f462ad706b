"""Positions as rotations: the score of a query and a key depends on their distance alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lineage_jax.kernels import stored, turn, turnable, unstored
from lineage_jax.nn.split import mesh_axes, on_each_device, platform, stored_axes
from lineage_jax.typing import Array, Float, Int


def rotate(
    heads: Float[Array, "B T H K"], positions: Int[Array, "#B T"], base: float
) -> Float[Array, "B T H K"]:
    """Turns pair i of each head by position / base^(2i / K) radians, in float32.

    Su et al. 2021, section 3.2.2, equation 15 (arXiv 2104.09864): the product of a query turned by
    m and a key turned by n knows n - m only (equation 16). Components i and i + K / 2 are a pair,
    as in the weights that Hugging Face distributes. The paper's pairs, neighbours, differ from
    them by the order of the columns in the matrices of queries and keys.

    Args:
      heads: queries or keys, of even width.
      positions: of each token.
      base: 10 000 in the paper.
    """
    straight, across = angles(positions, heads.shape[-1], base)
    if platform() == "tpu" and comes_in_blocks(heads):
        return turned(heads, straight, across)
    exact, other = heads.astype(jnp.float32), partners(heads).astype(jnp.float32)
    return (exact * straight[:, :, None] + other * across[:, :, None]).astype(heads.dtype)


def angles(
    positions: Int[Array, "#B T"], width: int, base: float
) -> tuple[Float[Array, "#B T K"], Float[Array, "#B T K"]]:
    """What each component is multiplied by, and what its partner is, before they are added."""
    half = width // 2
    rates = jnp.asarray(base ** -(np.arange(half) / half), jnp.float32)
    turns = positions[..., None].astype(jnp.float32) * rates.reshape(1, 1, half)
    cos, sin = jnp.cos(turns), jnp.sin(turns)  # B T K/2
    return jnp.concatenate((cos, cos), axis=-1), jnp.concatenate((-sin, sin), axis=-1)


@jax.custom_vjp
def partners(heads: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """Every component's other one: component i + K / 2 at i, and i at i + K / 2.

    A product with a permutation, which is exact: to cut and join within a row of numbers, a TPU
    moves them through its memory, which takes longer (`experiments/LOG.md`).
    """
    width = heads.shape[-1]
    swap = jnp.asarray(np.roll(np.eye(width), width // 2, axis=1), heads.dtype)
    return jnp.matmul(heads, swap, precision=jax.lax.Precision.HIGHEST)


partners.defvjp(lambda heads: (partners(heads), None), lambda _, grad: (partners(grad),))


def comes_in_blocks(heads: Float[Array, "B T H K"]) -> bool:
    """Whether the mesh divides heads into such as the kernel takes."""
    rows, columns, groups = (
        math.prod(mesh_axes(name).values()) for name in ("batch", "length", "heads")
    )
    batch, length, num_heads, width = heads.shape
    divided = batch % rows == length % columns == num_heads % groups == 0
    return divided and turnable(length // columns, width)


@jax.custom_vjp
def turned(
    heads: Float[Array, "B T H K"], straight: Float[Array, "#B T K"], across: Float[Array, "#B T K"]
) -> Float[Array, "B T H K"]:
    """heads * straight + partners * across, by a kernel on each device."""
    tables = (jnp.broadcast_to(x, (heads.shape[0], *x.shape[1:])) for x in (straight, across))
    width, axes, places = heads.shape[-1], stored_axes(heads.shape[-1]), ("batch", "length", None)

    def local(heads, straight, across):
        return (turn(heads, straight, across, interpret=platform() != "tpu"),)

    given = (stored(heads), *tables)
    (out,) = on_each_device(local, given, (axes, places, places), (axes,))
    return unstored(out, width)


def turned_back(angles, grad):
    """The gradient: turned as far the other way. Angles are made of integers, and have none."""
    straight, across = angles
    return turned(grad, straight, -across), None, None


turned.defvjp(lambda heads, *angles: (turned(heads, *angles), angles), turned_back)
