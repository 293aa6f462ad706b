"""The arm of learning in context that fits linear functions, each of them new."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.study.text import OPTIMIZER
from experiments.study.training import Recipe, train
from lineage_jax.data.demonstrations import linear_functions
from lineage_jax.models import gpt
from lineage_jax.nn import Embed, LayerNorm, Linear, decoder_mask, stack
from lineage_jax.train.metrics import config_json
from lineage_jax.typing import Array, Float

DIM, NOISE = 3, 0.5  # without noise least squares would make no mistake, and a ratio say nothing
ROWS = 64  # in a batch


class Regressor(nn.Module):
    """GPT's blocks between linear maps, from points to numbers (Garg et al. 2022, section 2)."""

    config: gpt.GPTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N M"], y: Float[Array, "B N"]) -> Float[Array, "B N"]:
        """Says each y from its x and the points before; y is read as a vector of zeros but one."""
        c, (batch, num, dim) = self.config, x.shape
        points = jnp.stack([x, jnp.pad(y[..., None], ((0, 0), (0, 0), (0, dim - 1)))], axis=2)
        read_in = Linear((dim,), (c.embed_dim,), ("embed_vector", "embed"), dim**-0.5, name="in")
        out = Linear((c.embed_dim,), (1,), ("embed", "embed_vector"), c.init_std, name="out")
        place = Embed(c.max_len, c.embed_dim, "position", c.init_std, name="positions")
        positions, reads = decoder_mask(2 * num, c.max_len, None, None, None, None)
        h = read_in(points.reshape(batch, 2 * num, dim)) + place(positions)
        blocks = stack(gpt.Block, c.num_layers)(c, False, name="blocks")
        h, _ = blocks(h, (positions, reads), (gpt.windows(c), None))
        return out(LayerNorm(c.norm_epsilon, name="final_norm")(h))[:, ::2, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitter:
    """A GPT-3 that reads points x, y of a line, with a new one in each row."""

    name: str
    config: gpt.GPTConfig
    num_test: int

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {
            "model": f"Regressor {config_json(self.config)}",
            "data": f"linear functions of {DIM} numbers, noise {NOISE}, rows of {2 * DIM + 1}",
            "rows": [ROWS, self.num_test],
            "optimizer": config_json(OPTIMIZER),
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`; squared errors after so many points, and those of least squares."""
        module = Regressor(self.config)
        recipe = Recipe(
            module=module, init=regressor_init, loss_fn=squared_error, optimizer=OPTIMIZER
        )

        def stack(first, count):
            x, y = zip(*(lines(seed, first + i, ROWS) for i in range(count)), strict=True)
            return {"x": np.stack(x), "y": np.stack(y)}

        params = train(recipe, stack, seed=seed, peak=learning_rate, updates=updates)
        x, y = lines(seed, 2**31, self.num_test)
        errors = np.square(np.asarray(regressor_program(module)(params, x, y)) - y).mean(0)
        found = {f"error_{k}": float(error) for k, error in enumerate(errors)}
        return {"loss": float(errors.mean()), **found, "least_squares": least_squares(x, y)}


def lines(seed: int, step: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """2 d points of each function, and one more."""
    return linear_functions(seed, step, rows=rows, num_points=2 * DIM + 1, dim=DIM, noise=NOISE)


def least_squares(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared error at the last point of each row, of what fits those before it best."""
    fits = [np.linalg.lstsq(a[:-1], b[:-1], rcond=None)[0] for a, b in zip(x, y, strict=True)]
    return float(np.square((np.stack(fits) * x[:, -1]).sum(-1) - y[:, -1]).mean())


def regressor_init(module, key):
    """The parameters, boxed."""
    return module.init(key, jnp.zeros((1, 2, DIM)), jnp.zeros((1, 2)))["params"]


def squared_error(module, *, train):
    """Mean squared error over all points (Garg et al. 2022, section 2)."""

    def loss(params, extra, batch, rng):
        errors = jnp.square(regressor_program(module)(params, batch["x"], batch["y"]) - batch["y"])
        return errors.mean(), (extra, {"loss": (errors.sum(), jnp.float32(errors.size))})

    return loss


@functools.cache
def regressor_program(module: Regressor) -> Any:
    """Of points: what is said of each."""
    return jax.jit(lambda params, x, y: module.apply({"params": params}, x, y))
