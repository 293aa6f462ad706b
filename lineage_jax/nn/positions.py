"""Positions as vectors that are added to what stands there."""

import jax.numpy as jnp
import numpy as np

from lineage_jax.typing import Array, Float, Int


def sinusoids(positions: Int[Array, "#B T"], width: int) -> Float[Array, "#B T D"]:
    """Sines and cosines of each position, at rates from 1 down to 1 / 10,000 radians a token.

    Vaswani et al. 2017, section 3.5: rate i is 10000^(-2i / width). The sines stand in the first
    half and the cosines in the second, as in the weights that Hugging Face distributes; the paper's
    alternate, which differs by the order of the columns in what reads them. An odd width has one
    sine more.

    Args:
      positions: of each token.
      width: how many components, D.
    """
    half = (width + 1) // 2
    rates = jnp.asarray(10_000.0 ** (-2 * np.arange(half) / width), jnp.float32)
    turns = positions[..., None].astype(jnp.float32) * rates.reshape(1, 1, half)
    return jnp.concatenate((jnp.sin(turns), jnp.cos(turns[..., : width - half])), axis=-1)
