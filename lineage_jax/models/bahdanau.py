"""RNNsearch: a decoder that looks back at the source, and learns where to look.

Paper:       Bahdanau, Cho and Bengio 2014, "Neural Machine Translation by Jointly Learning to Align
             and Translate", section 3 and appendix A. https://arxiv.org/abs/1409.0473
Builds on:   seq2seq.py, an encoder and a decoder; with the gated hidden units and the maxout of
             Cho et al. 2014 instead of its deep LSTMs.
What is new: a vector for each source word, from a recurrence in each direction, instead of one for
             the sentence; before each target word they are averaged, by weights that a small
             network computes from the decoder's state: attention.
Departures:  the appendix has biases but does not print them; here the units, the initial state, the
             alignment model and the maxout layer have one each, and the output none.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.nn import GRU, Embed, Linear, gru_cell, over_time
from lineage_jax.nn.recurrent import gathered
from lineage_jax.typing import Array, Bool, Float, Int, Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class BahdanauConfig:
    """What must be chosen to build one RNNsearch."""

    embed_dim: int
    """Width of a word's vector, m."""
    hidden_dim: int
    """Units of each recurrence, n."""
    alignment_dim: int
    """Units of the network that scores source words, n'."""
    maxout_dim: int
    """Units of the layer below the output, l, each the larger of two."""
    source_vocab_size: int
    vocab_size: int
    """Of the target language."""
    init_std: float = 0.01
    """Standard deviation of most initial weights (appendix B.1)."""
    alignment_std: float = 0.001
    """Of those of the alignment model, W_a and U_a (appendix B.1); v_a starts at zero."""
    dtype: Precision = "float32"
    """Of activations; logits and alignment weights are float32."""
    param_dtype: Precision = "float32"

    def __post_init__(self):
        sizes = ("embed_dim", "hidden_dim", "alignment_dim", "maxout_dim")
        for name in (*sizes, "source_vocab_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def rnnsearch() -> BahdanauConfig:
    """Appendix A.2.3, with the 30 000 words of section 4.1 in each language."""
    return BahdanauConfig(
        embed_dim=620,
        hidden_dim=1000,
        alignment_dim=1000,
        maxout_dim=500,
        source_vocab_size=30_000,
        vocab_size=30_000,
    )


class Cache(NamedTuple):
    """What the decoder remembers, and what it looks back at.

    Attributes:
      hidden: its state, s.
      annotations: one vector per source word, h (equation 7).
      keys: U_a h, which no step changes.
      source_mask: True for real source words.
    """

    hidden: Float[Array, "B N"]
    annotations: Float[Array, "B S D"]
    keys: Float[Array, "B S K"]
    source_mask: Bool[Array, "B S"]


def additive_scores(
    query: Float[Array, "B K"], keys: Float[Array, "B S K"], vector: Float[Array, "K"]
) -> Float[Array, "B S"]:
    """v_a . tanh(W_a s + U_a h) for each source word (appendix A.1.2), in float32.

    Args:
      query: W_a s, of the decoder's state.
      keys: U_a h, of each source word.
      vector: v_a.
    """
    scores = jnp.einsum("bsk,k->bs", jnp.tanh(query[:, None] + keys), vector)
    return scores.astype(jnp.float32)


def alignment(scores: Float[Array, "B S"], visible: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """The softmax of the scores over what is visible (equation 6); zero elsewhere, and in float32.

    A row that sees nothing gets zeros.
    """
    scores = jnp.where(visible, scores.astype(jnp.float32), -1e30)  # finite: no NaN in such a row
    return jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)


class Encoder(nn.Module):
    """Reads the sentence in both directions (appendix A.2.1)."""

    config: BahdanauConfig

    @nn.compact
    def __call__(
        self, source: Int[Array, "B S"], mask: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B N"]]:
        """A vector per word, [forward; backward], and the backward state at the first word."""
        c = self.config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        x = Embed(c.source_vocab_size, c.embed_dim, stddev=c.init_std, name="embed", **types)(
            source
        )
        forward, _ = GRU(c.hidden_dim, c.init_std, name="forward", **types)(x, None, mask)
        backward, first = GRU(c.hidden_dim, c.init_std, reverse=True, name="backward", **types)(
            x, None, mask
        )
        return jnp.concatenate([forward, backward], axis=-1), first


class Bahdanau(nn.Module):
    """Scores every next word of a translation, given the sentence and the words before.

    Sows the weights [B, T, S] of the source words as "alignment" into "intermediates".
    """

    config: BahdanauConfig

    def setup(self):
        c = self.config
        n, m, out = c.hidden_dim, c.embed_dim, 2 * c.maxout_dim
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)

        def linear(name, width, out, stddev=c.init_std, use_bias=False):
            axes = ("embed", "mlp")
            return Linear((width,), (out,), axes, stddev, use_bias=use_bias, name=name, **types)

        def weight(name, stddev, axes, *shape):
            init = nn.with_logical_partitioning(nn.initializers.normal(stddev), axes)
            return self.param(name, init, shape, c.param_dtype)

        self.encoder = Encoder(c, name="encoder")
        self.initial = linear("initial", n, n, use_bias=True)  # W_s

        self.align_key = linear(  # U_a
            "align_key", 2 * n, c.alignment_dim, c.alignment_std, use_bias=True
        )
        self.align_query = weight(  # W_a
            "align_query", c.alignment_std, ("embed", "mlp"), n, c.alignment_dim
        )
        self.align_vector = weight("align_vector", 0.0, ("embed_vector",), c.alignment_dim)  # v_a

        self.embed = Embed(c.vocab_size, m, stddev=c.init_std, name="embed", **types)  # E
        self.gru = GRU(n, c.init_std, name="gru", **types)  # W, U, W_z, U_z, W_r, U_r
        self.context = weight(  # C_z, C_r, C
            "context", c.init_std, ("embed", "gates", "mlp"), 2 * n, 3, n
        )

        self.from_state = linear("from_state", n, out, use_bias=True)  # U_o
        self.from_word = linear("from_word", m, out)  # V_o
        self.from_context = linear("from_context", 2 * n, out)  # C_o
        self.head = Embed(  # W_o
            c.vocab_size, c.maxout_dim, stddev=c.init_std, name="head", **types
        )

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
          train: as for other translators; it changes nothing where there is no dropout.
        """
        return self.decode(tokens, None, self.start(source, source_mask), mask)[0]

    def start(
        self,
        source: Int[Array, "B S"],
        source_mask: Bool[Array, "B S"] | None = None,
        length: int | None = None,
    ) -> Cache:
        """Reads the sentence; a recurrence needs no room for the `length` of its translation."""
        if source_mask is None:
            source_mask = jnp.ones(source.shape, bool)
        annotations, first = self.encoder(source, source_mask)
        hidden = jnp.tanh(self.initial(first))  # s_0, appendix A.2.2
        return Cache(hidden, annotations, self.align_key(annotations), source_mask)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        cache: Cache,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Reads more of the translation.

        Args:
          tokens: ids in [0, vocab_size), which follow those that the cache has read.
          positions: of each token in the translation; a recurrence does without them.
          cache: of `start`, or of the last `decode`.
          mask: True for real tokens; the cache stays as it was at the others.

        Returns:
          The logits after each token, and the cache with these tokens read.
        """
        c = self.config
        words = self.embed(tokens)  # B T M
        projected, recurrent = self.gru.project(words)
        of_context = gathered(self.context.astype(c.dtype), ("embed", "gates", "mlp"))
        of_query = gathered(self.align_query.astype(c.dtype), ("embed", "mlp"))
        vector = self.align_vector.astype(c.dtype)

        def step(hidden, projected):
            scores = additive_scores(hidden @ of_query, cache.keys, vector)
            weights = alignment(scores, cache.source_mask)
            context = jnp.einsum("bs,bsd->bd", weights.astype(c.dtype), cache.annotations)
            projected = projected + jnp.einsum("bm,mgn->bgn", context, of_context)
            return gru_cell(projected, hidden, recurrent), (hidden, context, weights)

        hidden, (before, contexts, weights) = over_time(step, cache.hidden, projected, mask)
        self.sow("intermediates", "alignment", weights)
        # The state is the one before the word, s_(i-1), as appendix A.2.2 prints it (equation 4
        # has s_i); the word and its context are this step's.
        deep = self.from_state(before) + self.from_word(words) + self.from_context(contexts)
        pairs = deep.reshape(*deep.shape[:2], c.maxout_dim, 2)
        return self.head.attend(pairs.max(-1)), cache._replace(hidden=hidden)


def num_params(config: BahdanauConfig) -> dict[str, int]:
    """How many parameters there are: "total", and "non_embedding" without the three tables.

    The tables are those of the source, of the target, and of the head.
    """
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Bahdanau(config).init, jax.random.key(0), ids, ids)["params"]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    tables = (config.source_vocab_size + config.vocab_size) * config.embed_dim
    tables += config.vocab_size * config.maxout_dim
    return {"total": total, "non_embedding": total - tables}
