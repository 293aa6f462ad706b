"""How likely a model finds given continuations, and whether it would have written them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lineage_jax.typing import Array, Bool, Float, Int


class Scores(NamedTuple):
    """Of one continuation in each row.

    Attributes:
      log_prob: of the whole continuation after what stands before it, nats.
      num_tokens: of the continuation.
      likeliest: whether each of its tokens is the likeliest after those before: a greedy search
        writes it.
    """

    log_prob: Float[Array, "B"]
    num_tokens: Int[Array, "B"]
    likeliest: Bool[Array, "B"]


def score_continuations(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    starts: Int[Array, "B"],
    ends: Int[Array, "B"],
) -> Scores:
    """Scores the part of each row from its start up to its end.

    Args:
      logits: of each next token; those at t score the token at t + 1.
      tokens: the rows, padded on the right with any id.
      starts: where the continuation begins, at least 1: the first token has none before it.
      ends: where the padding begins.
    """
    log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    targets = tokens[:, 1:]
    place = jnp.arange(1, tokens.shape[1])[None]
    inside = (place >= starts[:, None]) & (place < ends[:, None])  # B T-1
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return Scores(
        log_prob=jnp.where(inside, chosen, 0.0).sum(-1),
        num_tokens=inside.sum(-1),
        likeliest=((log_probs.argmax(-1) == targets) | ~inside).all(-1),
    )
