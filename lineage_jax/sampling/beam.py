"""Beam search: the likeliest of many continuations, several kept at each token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lineage_jax.sampling.decode import Decoder
from lineage_jax.typing import Array, Bool, Float, Int

NEVER = -1e30  # finite, so that differences of two of them are not NaN


class Beams(NamedTuple):
    """What a search holds, K of each for every row.

    Attributes:
      tokens: of the beams that go on.
      log_probs: theirs, nats.
      ended: tokens of the best that have ended.
      scores: theirs, with the penalty of their length.
      logits: of the next token of those that go on.
      cache: theirs, beams of a row side by side.
    """

    tokens: Int[Array, "B K N"]
    log_probs: Float[Array, "B K"]
    ended: Int[Array, "B K N"]
    scores: Float[Array, "B K"]
    logits: Float[Array, "B K V"]
    cache: Any


def length_penalty(length: Any, alpha: float) -> Any:
    """((5 + length) / 6)^alpha, which log-probabilities are divided by (Wu et al. 2016, eq. 14).

    arXiv 1609.08144.
    """
    return ((5.0 + length) / 6.0) ** alpha


def batch_axes(make: Callable[[int], Any]) -> Any:
    """The axis of each array of a cache that its rows lie along.

    Args:
      make: a cache of that many rows; it is traced, and not run.
    """

    def axis(two: Any, three: Any) -> int:
        return next(
            i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b
        )

    return jax.tree.map(axis, jax.eval_shape(lambda: make(2)), jax.eval_shape(lambda: make(3)))


def beam_search(
    decoder: Decoder,
    cache: Any,
    axes: Any,
    start: Int[Array, "B"],
    num_tokens: int,
    end: int,
    *,
    num_beams: int = 4,
    alpha: float = 0.6,
) -> tuple[Int[Array, "B K N"], Float[Array, "B K"]]:
    """The K best continuations of `start`, the best first.

    Beams that end leave the search, and are ranked by log p / `length_penalty`; it is over when no
    beam that goes on can do better, or at `num_tokens`, where those that have not ended rank after
    those that have.

    Args:
      decoder: the model, parameters bound; the starts stand at position 0.
      cache: of B rows, with room for num_tokens positions.
      axes: which axis of each of its arrays the rows lie along (`batch_axes`).
      start: the first token of each row, which is not returned.
      num_tokens: longest continuation, its end included.
      end: the id that ends one.
      num_beams: K; 4 in Vaswani et al. 2017, section 6.1.
      alpha: of the penalty; 0.6 there; 0 ranks by probability.

    Returns:
      The ids, filled up with `end`, and the scores.
    """
    rows, k = start.shape[0], num_beams

    def flat(x: Array) -> Array:
        return x.reshape(rows * k, *x.shape[2:])

    def widened(x: Array, axis: int) -> Array:
        return jnp.repeat(x, k, axis)

    def chosen(x: Array, axis: int, parents: Int[Array, "B K"]) -> Array:
        index = (jnp.arange(rows)[:, None] * k + parents).ravel()
        return jnp.take(x, index, axis)

    def read(tokens: Int[Array, "B K"], position: Any, cache: Any) -> tuple[Array, Any]:
        at = jnp.full((rows * k, 1), position)
        logits, cache = decoder(flat(tokens)[:, None], at, cache)
        return logits[:, 0].reshape(rows, k, -1), cache

    def going(carry: tuple[Any, Beams]) -> Bool[Array, ""]:
        number, beams = carry
        # Log-probabilities only fall, and the penalty is mildest at the end.
        best = beams.log_probs.max(-1) / length_penalty(num_tokens, alpha)
        return (number < num_tokens) & (best > beams.scores.min(-1)).any()

    def body(carry: tuple[Any, Beams]) -> tuple[Any, Beams]:
        number, beams = carry
        log_probs = jax.nn.log_softmax(beams.logits.astype(jnp.float32), axis=-1)
        totals = beams.log_probs[..., None] + log_probs  # B K V
        vocab_size = totals.shape[-1]
        # Of 2 K candidates at most K end, so that K go on. Only the K likeliest may end: a beam
        # of one is then the likeliest token after another.
        best, index = jax.lax.top_k(totals.reshape(rows, -1), 2 * k)
        parents, token = index // vocab_size, index % vocab_size
        tokens = jnp.take_along_axis(beams.tokens, parents[..., None], axis=1)
        tokens = tokens.at[:, :, number].set(token)
        ends = token == end

        among = ends & (jnp.arange(2 * k) < k)[None]
        scores = jnp.where(among, best / length_penalty(number + 1, alpha), NEVER)
        all_scores = jnp.concatenate((beams.scores, scores), axis=1)
        all_ended = jnp.concatenate((beams.ended, tokens), axis=1)
        scores, index = jax.lax.top_k(all_scores, k)
        ended = jnp.take_along_axis(all_ended, index[..., None], axis=1)

        log_probs, index = jax.lax.top_k(jnp.where(ends, NEVER, best), k)
        parents, token = (jnp.take_along_axis(x, index, axis=1) for x in (parents, token))
        tokens = jnp.take_along_axis(tokens, index[..., None], axis=1)
        cache = jax.tree.map(lambda x, axis: chosen(x, axis, parents), beams.cache, axes)
        logits, cache = read(token, number + 1, cache)
        return number + 1, Beams(tokens, log_probs, ended, scores, logits, cache)

    cache = jax.tree.map(widened, cache, axes)
    logits, cache = read(jnp.repeat(start[:, None], k, axis=1), 0, cache)
    empty = jnp.full((rows, k, num_tokens), end, jnp.int32)
    first = jnp.where(jnp.arange(k) == 0, 0.0, NEVER)  # all beams are alike at the start
    log_probs = jnp.broadcast_to(first, (rows, k))
    beams = Beams(empty, log_probs, empty, jnp.full((rows, k), NEVER), logits, cache)
    _, beams = jax.lax.while_loop(going, body, (0, beams))

    # What has not ended ranks behind what has: both are in order of their scores.
    count = (beams.scores > NEVER).sum(-1, keepdims=True)
    place = jnp.broadcast_to(jnp.arange(k), (rows, k))
    index = jnp.where(place < count, place, k + place - count)
    unfinished = beams.log_probs / length_penalty(num_tokens, alpha)
    scores = jnp.concatenate((beams.scores, unfinished), axis=1)
    tokens = jnp.concatenate((beams.ended, beams.tokens), axis=1)
    return (
        jnp.take_along_axis(tokens, index[..., None], axis=1),
        jnp.take_along_axis(scores, index, axis=1),
    )
