"""Text from a language model, one token at a time, with a preallocated cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lineage_jax.typing import Array, Float, Int, PRNGKeyArray

Decoder = Callable[[Int[Array, "B T"], Int[Array, "B T"], Any], tuple[Float[Array, "B T V"], Any]]
"""(tokens, positions, cache) -> (logits, cache): a model with its parameters bound."""


def choose(
    logits: Float[Array, "B V"], rng: PRNGKeyArray, temperature: int | float, top_k: int | None
) -> Int[Array, "B"]:
    """One id per row: the likeliest at temperature 0, else a draw from the top k."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(rng, logits / temperature)


def generate(
    decoder: Decoder,
    cache: Any,
    prompt: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    num_tokens: int,
    rng: PRNGKeyArray,
    *,
    temperature: int | float = 1.0,
    top_k: int | None = None,
) -> Int[Array, "B N"]:
    """Continues each prompt by `num_tokens` tokens.

    Args:
      decoder: the model, parameters bound.
      cache: room for T + num_tokens positions.
      prompt: ids, padded on the right with any id.
      lengths: how many ids of each row are its prompt, at least 1.
      num_tokens: how many to add.
      rng: of the draws.
      temperature: 0 takes the likeliest token; 1 draws from the model's distribution.
      top_k: draws among the k likeliest only (Fan et al. 2018, section 5.1).

    Returns:
      The new ids.
    """
    positions = jnp.broadcast_to(jnp.arange(prompt.shape[1]), prompt.shape)
    logits, cache = decoder(prompt, positions, cache)
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]  # B V

    def body(carry, rng):
        logits, cache, position = carry
        token = choose(logits, rng, temperature, top_k)
        logits, cache = decoder(token[:, None], position[:, None], cache)
        return (logits[:, 0], cache, position + 1), token

    _, tokens = jax.lax.scan(body, (last, cache, lengths), jax.random.split(rng, num_tokens))
    return tokens.T
