"""Positions as rotations: the score of a query and a key depends on their distance alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lineage_jax.kernels import stored, turn, turnable, unstored
from lineage_jax.kernels.platform import platform
from lineage_jax.nn.split import mesh_axes, on_each_device, stored_axes
from lineage_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slower rotations, for contexts longer than a model was trained on."""

    factor: float = 1.0
    """How many times slower pairs turn: all of them (position interpolation, Chen et al. 2023,
    section 3.2, arXiv 2306.15595), or the slow ones if `trained_len` is given."""
    trained_len: int | None = None
    """The context trained on, in tokens. If given, a pair that turns at most `slow_turns` times
    within it is slow; one that turns at least `fast_turns` times keeps its pace; between, the pace
    is mixed in proportion (Llama 3.1 as released; Grattafiori et al. 2024, arXiv 2407.21783)."""
    slow_turns: float = 1.0
    """Of Llama 3.1 as released."""
    fast_turns: float = 4.0
    """Of Llama 3.1 as released."""

    def __post_init__(self):
        if self.factor <= 0:
            raise ValueError(f"factor must be above 0, got {self.factor}")
        if not 0 <= self.slow_turns < self.fast_turns:
            raise ValueError(
                f"slow_turns={self.slow_turns} must be below fast_turns={self.fast_turns}"
            )

    def __call__(self, rates: np.ndarray) -> np.ndarray:
        """Radians a token, scaled."""
        slowed = rates / self.factor
        if self.trained_len is None:
            return slowed
        turns = rates * self.trained_len / (2 * math.pi)
        kept = (turns - self.slow_turns) / (self.fast_turns - self.slow_turns)
        kept = np.clip(kept, 0, 1)
        return kept * rates + (1 - kept) * slowed


def rotate(
    heads: Float[Array, "B T H K"],
    positions: Int[Array, "#B T"],
    base: float,
    scaling: RopeScaling | None = None,
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
      scaling: of the rotations; none if not given.
    """
    rates = base ** -(np.arange(0, heads.shape[-1], 2) / heads.shape[-1])
    straight, across = angles(positions, rates if scaling is None else scaling(rates))
    if platform() == "tpu" and comes_in_blocks(heads):
        return turned(heads, straight, across)
    exact, other = heads.astype(jnp.float32), partners(heads).astype(jnp.float32)
    return (exact * straight[:, :, None] + other * across[:, :, None]).astype(heads.dtype)


def angles(
    positions: Int[Array, "#B T"], rates: np.ndarray
) -> tuple[Float[Array, "#B T K"], Float[Array, "#B T K"]]:
    """What each component is multiplied by, and what its partner is, before they are added.

    Args:
      positions: of each token.
      rates: radians a token, of each pair.
    """
    each = jnp.asarray(rates, jnp.float32).reshape(1, 1, -1)
    turns = positions[..., None].astype(jnp.float32) * each
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
