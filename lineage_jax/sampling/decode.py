"""Text from a model, one token at a time: any that reads tokens and keeps what it has read.

A cache is whatever the model keeps: keys and values of a Transformer, states of a recurrence, what
an encoder made of a source. Nothing here looks into it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lineage_jax.typing import Array, Bool, Float, Int, PRNGKeyArray

Decoder = Callable[..., tuple[Float[Array, "B T V"], Any]]
"""(tokens, positions, cache, mask=None) -> (logits, cache): a model with its parameters bound.

The mask [B, T], which comes with prompts alone, is False for padding on their right. Where keys are
kept, those of padding are written over before they are read; a recurrence must not read it.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The defaults draw from the model's own distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draws among the k likeliest only (Fan et al. 2018, section 5.1)."""
    top_p: float | None = None
    """Draws among the fewest likeliest whose probabilities reach p: the nucleus (Holtzman et al.
    2020, section 3.1, arXiv 1904.09751)."""
    repetition_penalty: float = 1.0
    """Divides logits above zero, and multiplies those below, of tokens that were there before
    (Keskar et al. 2019, section 4.1, arXiv 1909.05858)."""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def __call__(
        self,
        logits: Float[Array, "B V"],
        rng: PRNGKeyArray,
        seen: Bool[Array, "B V"] | None = None,
    ) -> Int[Array, "B"]:
        """One id per row.

        Args:
          logits: of the next token.
          rng: of the draw.
          seen: which ids were there before, for the penalty.
        """
        if seen is not None and self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
            logits = jnp.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None:
            logits = jnp.where(nucleus(logits, self.top_p), logits, -jnp.inf)
        return jax.random.categorical(rng, logits)


def nucleus(logits: Float[Array, "B V"], top_p: float) -> Bool[Array, "B V"]:
    """The fewest likeliest tokens whose probabilities reach `top_p`: at least one."""
    order = jnp.argsort(-logits, axis=-1)
    sizes = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(sizes, axis=-1) - sizes  # what the likelier ones have together
    rank = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(before < top_p, rank, axis=-1)


@struct.dataclass
class State:
    """Where a batch of texts is.

    Attributes:
      logits: of the next token.
      cache: the model's.
      position: of the next token.
      seen: ids that were there before; None without a penalty on them.
      done: rows that have said a stop token.
    """

    logits: Float[Array, "B V"]
    cache: Any
    position: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None
    done: Bool[Array, "B"]


def begin(
    decoder: Decoder,
    cache: Any,
    prompt: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    sampling: Sampling,
) -> State:
    """Reads the prompts."""
    positions = jnp.broadcast_to(jnp.arange(prompt.shape[1]), prompt.shape)
    real = positions < lengths[:, None]
    logits, cache = decoder(prompt, positions, cache, real)
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]  # B V
    seen = None
    if sampling.repetition_penalty != 1:
        rows = jnp.arange(prompt.shape[0])[:, None]
        seen = jnp.zeros(last.shape, bool).at[rows, prompt].max(real)
    return State(last, cache, lengths, seen, jnp.zeros(prompt.shape[0], bool))


def advance(
    decoder: Decoder, state: State, rng: PRNGKeyArray, sampling: Sampling, stop: Sequence[int]
) -> tuple[State, Int[Array, "B"]]:
    """One token for each row, and the state after it; a row that is done repeats `stop[0]`."""
    token = sampling(state.logits, rng, state.seen).astype(jnp.int32)
    done, seen = state.done, state.seen
    if stop:
        token = jnp.where(done, stop[0], token)
        done = done | jnp.isin(token, jnp.asarray(stop))
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    logits, cache = decoder(token[:, None], state.position[:, None], state.cache)
    return State(logits[:, 0], cache, state.position + 1, seen, done), token


def generate(
    decoder: Decoder,
    cache: Any,
    prompt: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    num_tokens: int,
    rng: PRNGKeyArray,
    sampling: Sampling = Sampling(),
    stop: Sequence[int] = (),
) -> Int[Array, "B N"]:
    """Continues each prompt by `num_tokens` tokens, or until each has said a stop token.

    Args:
      decoder: the model, parameters bound.
      cache: room for T + num_tokens positions.
      prompt: ids, padded on the right with any id.
      lengths: how many ids of each row are its prompt, at least 1.
      num_tokens: how many to add.
      rng: of the draws.
      sampling: how each token is drawn.
      stop: ids that end a text.

    Returns:
      The new ids; after a stop token, `stop[0]`.
    """
    keys = jax.random.split(rng, num_tokens)
    fill = stop[0] if stop else 0
    ids = jnp.full((num_tokens, prompt.shape[0]), fill, jnp.int32)

    def going(carry):
        number, state, _ = carry
        return (number < num_tokens) & ~state.done.all()

    def body(carry):
        number, state, ids = carry
        state, token = advance(decoder, state, keys[number], sampling, stop)
        return number + 1, state, ids.at[number].set(token)

    state = begin(decoder, cache, prompt, lengths, sampling)
    return jax.lax.while_loop(going, body, (0, state, ids))[2].T


def stream(
    decoder: Decoder,
    cache: Any,
    prompt: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    num_tokens: int,
    rng: PRNGKeyArray,
    sampling: Sampling = Sampling(),
    stop: Sequence[int] = (),
) -> Iterator[Int[Array, "B"]]:
    """The same tokens as `generate`, each as soon as it is known; two compiled programs."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, key):
        return advance(decoder, state, key, sampling, stop)

    state = jax.jit(functools.partial(begin, decoder, sampling=sampling))(cache, prompt, lengths)
    for key in jax.random.split(rng, num_tokens):
        state, token = step(state, key)
        yield token
        if stop and bool(state.done.all()):
            return
