"""Luong attention: simpler scores, a window on the source, and a memory of where one looked.

Paper:       Luong, Pham and Manning 2015, "Effective Approaches to Attention-based Neural Machine
             Translation", sections 3 and 4.1. https://arxiv.org/abs/1508.04025
Builds on:   seq2seq.py, deep LSTMs in one direction, with dropout; bahdanau.py, whose scores are
             `concat` here, and which looks before the recurrence's step and not after.
What is new: scores that are inner products; attention to all of the source (global), or to a window
             about the target's own position (local-m) or about a predicted one (local-p); the
             attentional state, which scores words and is fed to the next step.
Departures:  the LSTMs have biases. The paper does not say what dropout acts on: as Zaremba et al.
             2014, on what enters each layer and what is scored. Weights of the location-based score
             are a softmax over the real source words. A window that lies behind the end of the
             source has weights of zero.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.models.bahdanau import additive_scores, alignment
from lineage_jax.nn import LSTMStack, LSTMState, UniformEmbed, lstm_cell, over_time
from lineage_jax.nn.recurrent import gathered, symmetric_uniform
from lineage_jax.typing import Array, Bool, Float, Int, Precision

Score = Literal["dot", "general", "concat", "location"]
Alignment = Literal["global", "local_m", "local_p"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LuongConfig:
    """What must be chosen to build one LSTM encoder-decoder with attention."""

    num_layers: int
    """Of the encoder, and of the decoder: each starts from its counterpart's state."""
    embed_dim: int
    """Width of a word's vector."""
    hidden_dim: int
    """Units of each LSTM, and of the attentional state."""
    source_vocab_size: int
    vocab_size: int
    """Of the target language."""
    score: Score = "general"
    """How a source word is scored: section 3.1, three equations and equation 8."""
    alignment: Alignment = "global"
    """Which source words are scored: all (section 3.1), or a window (section 3.2)."""
    window: int = 10
    """Words on either side of a local window's centre, D (section 4.1)."""
    max_source_len: int | None = None
    """Longest source that the location-based score has a weight for; words behind it get none."""
    input_feeding: bool = True
    """Whether a step reads the attentional state of the step before (section 3.3)."""
    dropout_rate: float = 0.0
    """0.2 in section 4.1."""
    init_scale: float = 0.1
    """All parameters start uniform in [-init_scale, init_scale] (section 4.1)."""
    forget_bias: float = 0.0
    """Added to the forget gate's bias at the start; the paper says nothing of it."""
    dtype: Precision = "float32"
    """Of activations; logits, alignment weights and the cells of the LSTMs are float32."""
    param_dtype: Precision = "float32"

    def __post_init__(self):
        sizes = ("num_layers", "embed_dim", "hidden_dim", "source_vocab_size", "vocab_size")
        for name in (*sizes, "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.score == "location" and self.alignment != "global":
            raise ValueError(f"score='location' is global, got alignment={self.alignment!r}")
        if self.score == "location" and (self.max_source_len or 0) < 1:
            raise ValueError(
                f"score='location' needs a max_source_len of at least 1, got {self.max_source_len}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")
        if self.init_scale <= 0:
            raise ValueError(f"init_scale must be more than 0, got {self.init_scale}")


def luong_global() -> LuongConfig:
    """Section 4.1, English to German; `location`, the score of table 1's global system.

    Sentences of more than 50 words were left out of the training.
    """
    return dataclasses.replace(
        luong_local(), alignment="global", score="location", max_source_len=50
    )


def luong_local() -> LuongConfig:
    """Section 4.1, English to German: the best of table 1's systems, local-p with `general`."""
    return LuongConfig(
        num_layers=4,
        embed_dim=1000,
        hidden_dim=1000,
        source_vocab_size=50_000,
        vocab_size=50_000,
        score="general",
        alignment="local_p",
        dropout_rate=0.2,
    )


class Cache(NamedTuple):
    """What the decoder remembers, and what it looks back at.

    Attributes:
      states: of each of its layers, from the lowest up.
      attentional: the attentional state of the last step (equation 5).
      outputs: the encoder's, one vector per source word.
      keys: W_a times these, which no step changes; where the score has no such product, these.
      source_mask: True for real source words.
    """

    states: tuple[LSTMState, ...]
    attentional: Float[Array, "B N"]
    outputs: Float[Array, "B S N"]
    keys: Float[Array, "B S N"]
    source_mask: Bool[Array, "B S"]


class Attention(nn.Module):
    """The parameters of section 3: of the score, the predicted place and the attentional state."""

    config: LuongConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        c = self.config
        n, matrix, vector = c.hidden_dim, ("embed", "mlp"), ("embed_vector",)
        wanted: dict[str, tuple[Any, ...]] = {"combine": (matrix, 2 * n, n)}  # W_c of equation 5
        if c.score == "general":
            wanted["key"] = (matrix, n, n)  # W_a
        elif c.score == "concat":  # W_a in two halves, for the source words and for h_t; v_a
            wanted |= {"key": (matrix, n, n), "query": (matrix, n, n), "vector": (vector, n)}
        elif c.score == "location":
            wanted["location"] = (("embed", "position"), n, c.max_source_len)  # W_a of equation 8
        if c.alignment == "local_p":  # W_p and v_p of equation 9
            wanted |= {"predict": (matrix, n, n), "predict_vector": (vector, n)}

        def weight(name, axes, *shape):
            init = nn.with_logical_partitioning(symmetric_uniform(c.init_scale), axes)
            value: Any = self.param(name, init, shape, c.param_dtype)
            return gathered(value.astype(c.dtype), axes)

        return {name: weight(name, *rest) for name, rest in wanted.items()}


def places(source_mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Where each source word stands among those of its row; the first real one at 0."""
    return jnp.cumsum(source_mask, axis=-1) - 1


def location_scores(
    by_place: Float[Array, "B N"], source_mask: Bool[Array, "B S"]
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """The scores of equation 8, which know a word by its place alone.

    Args:
      by_place: W_a h_t, a score for each place in a source.
      source_mask: True for real source words.

    Returns:
      The score of each source word, and which of them have one: the source may be longer.
    """
    place, length = places(source_mask), by_place.shape[1]
    scores = jnp.take_along_axis(by_place, jnp.clip(place, 0, length - 1), axis=1)
    return scores, source_mask & (place < length)


def predicted_place(
    hidden: Float[Array, "B N"],
    predict: Float[Array, "N N"],
    vector: Float[Array, "N"],
    source_mask: Bool[Array, "B S"],
) -> Float[Array, "B"]:
    """p_t = S sigmoid(v_p . tanh(W_p h_t)), between 0 and the source's length S (equation 9)."""
    share = nn.sigmoid((jnp.tanh(hidden @ predict) @ vector).astype(jnp.float32))
    return share * source_mask.sum(-1)


def local_weights(
    scores: Float[Array, "B S"],
    centre: Float[Array, "B"],
    source_mask: Bool[Array, "B S"],
    window: int,
    gaussian: bool,
) -> Float[Array, "B S"]:
    """Weights of the source words in [centre - D, centre + D] (section 3.2); float32.

    They are a softmax over the window (equation 7); with `gaussian`, times
    exp(-(s - centre)^2 / (2 sigma^2)), sigma = D / 2 (equation 10), after which their sum is less
    than one: the paper does not divide again.

    Args:
      scores: of each source word.
      centre: p_t, a place in the source; that of its first word is 0.
      source_mask: True for real source words.
      window: D, in words.
      gaussian: local-p, and not local-m.
    """
    distance = places(source_mask).astype(jnp.float32) - centre[:, None]
    weights = alignment(scores, source_mask & (jnp.abs(distance) <= window))
    return weights * jnp.exp(-2 * jnp.square(distance / window)) if gaussian else weights


def source_weights(
    config: LuongConfig,
    params: dict[str, Array],
    hidden: Float[Array, "B N"],
    position: Int[Array, "B"],
    keys: Float[Array, "B S N"],
    source_mask: Bool[Array, "B S"],
) -> Float[Array, "B S"]:
    """The alignment a_t of one target word with every source word (sections 3.1 and 3.2).

    Args:
      config: which score, and which source words.
      params: of `Attention`.
      hidden: the decoder's top output, h_t.
      position: of the target word, t.
      keys: of the source words (`Cache`).
      source_mask: True for real source words.
    """
    visible = source_mask
    if config.score == "location":
        scores, visible = location_scores(hidden @ params["location"], source_mask)
    elif config.score == "concat":
        scores = additive_scores(hidden @ params["query"], keys, params["vector"])
    else:
        scores = jnp.einsum("bn,bsn->bs", hidden, keys)
    if config.alignment == "global":
        return alignment(scores, visible)
    if config.alignment == "local_m":
        centre = position.astype(jnp.float32)
    else:
        predict, vector = params["predict"], params["predict_vector"]
        centre = predicted_place(hidden, predict, vector, source_mask)
    return local_weights(
        scores, centre, source_mask, config.window, gaussian=config.alignment == "local_p"
    )


class Luong(nn.Module):
    """Scores every next word of a translation, given the sentence and the words before.

    Sows the weights [B, T, S] of the source words as "alignment" into "intermediates".
    """

    config: LuongConfig

    def setup(self):
        c = self.config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)

        def table(size, width, name):
            return UniformEmbed(size, width, init_scale=c.init_scale, name=name, **types)

        def lstm(dropout_rate, name):
            return LSTMStack(
                c.num_layers,
                c.hidden_dim,
                c.init_scale,
                c.forget_bias,
                dropout_rate,
                name=name,
                **types,
            )

        self.source_embed = table(c.source_vocab_size, c.embed_dim, "source_embed")
        self.encoder = lstm(c.dropout_rate, "encoder")
        self.embed = table(c.vocab_size, c.embed_dim, "embed")
        self.decoder = lstm(0.0, "decoder")  # `decode` steps through its layers, and drops
        self.attention = Attention(c, name="attention")
        self.head = table(c.vocab_size, c.hidden_dim, "head")  # W_s of equation 6
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self,
        source: Int[Array, "B S"],
        tokens: Int[Array, "B T"],
        source_mask: Bool[Array, "B S"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """Maps a sentence and its translation to float32 logits; position t scores target t.

        Args:
          source: ids in [0, source_vocab_size).
          tokens: ids in [0, vocab_size): the start symbol, then the target but for its last word.
          source_mask: True for real source tokens; all if not given.
          mask: True for real target tokens; all if not given.
          train: whether dropout acts; it then needs an rng named "dropout".
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        cache = self.start(source, source_mask, train=train)
        return self.decode(tokens, positions, cache, mask, train)[0]

    def start(
        self,
        source: Int[Array, "B S"],
        source_mask: Bool[Array, "B S"] | None = None,
        length: int | None = None,
        train: bool = False,
    ) -> Cache:
        """Reads the sentence; a recurrence needs no room for the `length` of its translation."""
        if source_mask is None:
            source_mask = jnp.ones(source.shape, bool)
        x = self.source_embed(source)
        outputs, states = self.encoder(x, None, source_mask, train)
        params = self.attention()
        keys = outputs @ params["key"] if "key" in params else outputs
        # Nothing has been looked at yet: zeros are fed to the first step.
        return Cache(states, jnp.zeros_like(outputs[:, 0]), outputs, keys, source_mask)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Reads more of the translation.

        Args:
          tokens: ids in [0, vocab_size), which follow those that the cache has read.
          positions: of each token in the translation, from 0: where local-m looks.
          cache: of `start`, or of the last `decode`.
          mask: True for real tokens; the cache stays as it was at the others.
          train: whether dropout acts.

        Returns:
          The logits after each token, and the cache with these tokens read.
        """
        c = self.config
        x = self.dropout(self.embed(tokens), deterministic=not train)
        lowest, *higher = self.decoder.weights(c.embed_dim + c.input_feeding * c.hidden_dim)
        of_word, of_attentional = jnp.split(lowest.kernel, [c.embed_dim])
        projected = lowest._replace(kernel=of_word).project(x)  # B T 4 N
        params = self.attention()

        def step(carry, at):
            states, attentional = carry
            gates, position, kept = at
            dropped = (lambda x, layer: x) if kept is None else lambda x, layer: x * kept[:, layer]
            if c.input_feeding:
                gates += jnp.einsum("bm,mgn->bgn", dropped(attentional, 0), of_attentional)
            after = [lstm_cell(gates, states[0], lowest.recurrent)]
            for layer, weights in enumerate(higher, start=1):
                gates = weights.project(dropped(after[-1].hidden, layer))
                after.append(lstm_cell(gates, states[layer], weights.recurrent))
            hidden = after[-1].hidden
            weights = source_weights(c, params, hidden, position, cache.keys, cache.source_mask)
            context = jnp.einsum("bs,bsn->bn", weights.astype(c.dtype), cache.outputs)
            both = jnp.concatenate([context, hidden], axis=-1)
            attentional = jnp.tanh(both @ params["combine"])  # equation 5
            return (tuple(after), attentional), (attentional, weights)

        kept = None  # or, for each layer's input at each token, 0 or 1 / (1 - dropout_rate)
        if train and c.dropout_rate:
            ones = jnp.ones((*tokens.shape, c.num_layers, c.hidden_dim), c.dtype)
            kept = self.dropout(ones, deterministic=False)
        carry = (cache.states, cache.attentional)
        carry, (outputs, weights) = over_time(step, carry, (projected, positions, kept), mask)
        self.sow("intermediates", "alignment", weights)
        logits = self.head.attend(self.dropout(outputs, deterministic=not train))
        return logits, cache._replace(states=carry[0], attentional=carry[1])


def num_params(config: LuongConfig) -> dict[str, int]:
    """How many parameters there are: "total", and "non_embedding" without the three tables.

    The tables are those of the source, of the target, and of the head.
    """
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Luong(config).init, jax.random.key(0), ids, ids)["params"]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    tables = (config.source_vocab_size + config.vocab_size) * config.embed_dim
    tables += config.vocab_size * config.hidden_dim
    return {"total": total, "non_embedding": total - tables}
