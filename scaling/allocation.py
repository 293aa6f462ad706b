"""The best use of compute under a law of N and D: for training alone, or with inference to come."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling.laws import Law

INFERENCE = 1 / 3  # of the FLOPs per token of training: forward without backward


@dataclass(frozen=True, kw_only=True)
class Optimal:
    """The best model and tokens for some compute; intervals are {name: (low, high)}.

    Attributes:
      flops: of training.
      params, tokens: N and D.
      loss: predicted, nats per token.
      inference_flops: of the tokens that the model is to serve; 0 if none were named.
      intervals: of params, tokens, loss and flops, where asked for.
    """

    flops: Any
    params: Any
    tokens: Any
    loss: Any
    inference_flops: Any = 0.0
    intervals: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def training_cost(params: np.ndarray, tokens: np.ndarray, flops: np.ndarray) -> tuple[float, float]:
    """FLOPs per token as k N^p, by least squares on runs; exactly (6, 1) for 6ND."""
    n, rate = np.log(params), np.log(flops / tokens)
    if np.ptp(rate - n) < 1e-6 or np.ptp(n) < 1e-9:
        return float(np.exp(np.mean(rate - n))), 1.0
    p, k = np.polyfit(n, rate, 1)
    return float(np.exp(k)), float(p)


def allocate(
    law: Law,
    parameters: Mapping[str, Any],
    cost: tuple[float, float],
    flops: np.ndarray,
    inference_tokens: float = 0.0,
) -> dict[str, np.ndarray]:
    """Where a law's loss is least along C = k N^p D; or what then costs least to train and serve.

    With `inference_tokens`, T, the loss is that of the compute-optimal model of `flops`, and of all
    (N, D) that reach it the one of least k N^p (D + T / 3) is wanted (Sardana et al. 2024, equation
    3, arXiv 2401.00448): a smaller model, trained for longer.

    Args:
      law: of params and tokens.
      parameters: scalars, or (B, 1) for B draws.
      cost: (k, p).
      flops: training budgets, (M,).
      inference_tokens: tokens that the model is to read or write after training.

    Returns:
      params, tokens, loss, flops and inference_flops, (M,) or (B, M) each.
    """
    batched = any(np.ndim(v) for v in parameters.values())
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        values = {name: jnp.asarray(v, jnp.float64) for name, v in parameters.items()}
        budget = jnp.asarray(flops[None] if batched else flops, jnp.float64)
        served = jnp.float64(inference_tokens)
        found = _allocate(values, budget, *map(jnp.float64, cost), served, law=law)
        return {name: np.asarray(value) for name, value in found.items()}


@partial(jax.jit, static_argnames="law")
def _allocate(parameters: Any, flops: Any, k: Any, p: Any, served: Any, *, law: Law) -> Any:
    def loss(log_n: Any, log_d: Any) -> Any:
        return law.function({"params": jnp.exp(log_n), "tokens": jnp.exp(log_d)}, **parameters)

    def slopes(log_n: Any, log_d: Any) -> Any:
        """d loss / d log N and d loss / d log D."""
        one, zero = jnp.ones_like(log_n), jnp.zeros_like(log_n)
        return tuple(jax.jvp(loss, (log_n, log_d), way)[1] for way in ((one, zero), (zero, one)))

    def along(log_n: Any) -> Any:
        return jnp.log(flops / k) - p * log_n

    def too_small(log_n: Any) -> Any:
        by_n, by_d = slopes(log_n, along(log_n))
        return by_n - p * by_d < 0

    shape = jnp.broadcast_shapes(flops.shape, *(jnp.shape(v) for v in parameters.values()))
    even = jnp.broadcast_to(jnp.log(flops / k) / (1 + p), shape)
    best_n = _bisect(too_small, even - 40.0, even + 40.0)
    best_d = along(best_n)
    wanted = loss(best_n, best_d)

    def needed(log_n: Any) -> Any:
        """log D with which a model reaches the wanted loss; e^60 times more if none does."""
        return _bisect(lambda log_d: loss(log_n, log_d) > wanted, best_d - 1.0, best_d + 60.0)

    def too_small_to_serve(log_n: Any) -> Any:
        # The slope of k N^p (D + T / 3) in log N, over k N^p, along the line of equal loss.
        log_d = needed(log_n)
        by_n, by_d = slopes(log_n, log_d)
        slope = p * (jnp.exp(log_d) + INFERENCE * served) - jnp.exp(log_d) * by_n / by_d
        return (slope < 0) | (log_d > best_d + 59.0) | ~jnp.isfinite(slope)

    log_n = jnp.where(served > 0, _bisect(too_small_to_serve, best_n - 20.0, best_n), best_n)
    log_d = jnp.where(served > 0, needed(log_n), best_d)
    per_token = k * jnp.exp(p * log_n)
    return {
        "params": jnp.exp(log_n),
        "tokens": jnp.exp(log_d),
        "loss": loss(log_n, log_d),
        "flops": per_token * jnp.exp(log_d),
        "inference_flops": INFERENCE * per_token * served,
    }


def _bisect(below: Any, low: Any, high: Any) -> Any:
    """Where `below` turns from true to false, to 64 bits."""

    def halve(_: Any, bracket: Any) -> Any:
        low, high = bracket
        middle = (low + high) / 2
        up = below(middle)
        return jnp.where(up, middle, low), jnp.where(up, high, middle)

    low, high = jax.lax.fori_loop(0, 64, halve, (low, high))
    return (low + high) / 2
