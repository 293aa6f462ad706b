"""Positions as rotations: the score of a query and a key depends on their distance alone."""

import jax
import jax.numpy as jnp
import numpy as np

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
    half = heads.shape[-1] // 2
    rates = jnp.asarray(base ** -(np.arange(half) / half), jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * rates.reshape(1, 1, 1, half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)  # B T 1 K/2
    straight = jnp.concatenate((cos, cos), axis=-1)
    across = jnp.concatenate((-sin, sin), axis=-1)
    exact = heads.astype(jnp.float32)
    return (exact * straight + partners(heads).astype(jnp.float32) * across).astype(heads.dtype)


@jax.custom_vjp
def partners(heads: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """Every component's other one: component i + K / 2 at i, and i at i + K / 2.

    A product with a permutation, which is exact: to cut and join within a row of 128 numbers, a TPU
    moves them through its memory, which takes longer (`experiments/LOG.md`).
    """
    width = heads.shape[-1]
    swap = jnp.asarray(np.roll(np.eye(width), width // 2, axis=1), heads.dtype)
    return jnp.matmul(heads, swap, precision=jax.lax.Precision.HIGHEST)


partners.defvjp(lambda heads: (partners(heads), None), lambda _, grad: (partners(grad),))
