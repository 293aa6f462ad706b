"""Sequence to sequence: one LSTM reads a sentence into a vector, another writes from it.

Paper:       Sutskever, Vinyals and Le 2014, "Sequence to Sequence Learning with Neural Networks",
             sections 2 and 3.4. https://arxiv.org/abs/1409.3215
Builds on:   the LSTM (Hochreiter and Schmidhuber 1997, as in Graves 2013), and the encoder-decoder
             of Kalchbrenner and Blunsom 2013 and Cho et al. 2014.
What is new: two deep LSTMs, one for each language; the states of all layers after the last source
             word are all that the second one knows of the sentence. Reversing the source, which
             the paper found to matter most (section 3.3), is done to the data and not here.
Departures:  padded tokens change nothing, so sentences of any lengths share a batch; the paper puts
             those of one length together (section 3.4).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.nn import LSTMStack, LSTMState, UniformEmbed
from lineage_jax.typing import Array, Bool, Float, Int, Precision

Cache = tuple[LSTMState, ...]
"""The decoder's state, of each layer from the lowest up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """What must be chosen to build one LSTM encoder-decoder."""

    num_layers: int
    """Of the encoder, and of the decoder: each starts from its counterpart's state."""
    embed_dim: int
    """Width of a word's vector."""
    hidden_dim: int
    """Units of each LSTM."""
    source_vocab_size: int
    vocab_size: int
    """Of the target language."""
    init_scale: float = 0.08
    """All parameters start uniform in [-init_scale, init_scale] (section 3.4)."""
    forget_bias: float = 0.0
    """Added to the forget gate's bias at the start; the paper says nothing of it."""
    dtype: Precision = "float32"
    """Of activations; logits and the cells of the LSTMs are float32."""
    param_dtype: Precision = "float32"

    def __post_init__(self):
        sizes = ("num_layers", "embed_dim", "hidden_dim", "source_vocab_size", "vocab_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.init_scale <= 0:
            raise ValueError(f"init_scale must be more than 0, got {self.init_scale}")


def seq2seq_2014() -> Seq2SeqConfig:
    """Section 3.4, English to French: 384 M parameters, 64 M of them recurrent."""
    return Seq2SeqConfig(
        num_layers=4,
        embed_dim=1000,
        hidden_dim=1000,
        source_vocab_size=160_000,
        vocab_size=80_000,
    )


class Block(nn.Module):
    """A table of words and the LSTMs that read them: the encoder, and the decoder."""

    config: Seq2SeqConfig
    vocab_size: int

    def setup(self):
        c = self.config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        self.embed = UniformEmbed(
            self.vocab_size, c.embed_dim, init_scale=c.init_scale, name="embed", **types
        )
        self.lstm = LSTMStack(
            c.num_layers, c.hidden_dim, c.init_scale, c.forget_bias, name="lstm", **types
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        states: Cache | None,
        mask: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T N"], Cache]:
        return self.lstm(self.embed(tokens), states, mask)


class Seq2Seq(nn.Module):
    """Scores every next word of a translation, given the sentence and the words before."""

    config: Seq2SeqConfig

    def setup(self):
        c = self.config
        self.encoder = Block(c, c.source_vocab_size, name="encoder")
        self.decoder = Block(c, c.vocab_size, name="decoder")
        self.head = UniformEmbed(
            c.vocab_size,
            c.hidden_dim,
            init_scale=c.init_scale,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            name="head",
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
        return self.encoder(source, None, source_mask)[1]

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
        outputs, cache = self.decoder(tokens, cache, mask)
        return self.head.attend(outputs), cache


def num_params(config: Seq2SeqConfig) -> dict[str, int]:
    """How many parameters there are: "total", and "non_embedding" without the three tables.

    The tables are those of the source, of the target, and of the head.
    """
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Seq2Seq(config).init, jax.random.key(0), ids, ids)["params"]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    tables = (config.source_vocab_size + config.vocab_size) * config.embed_dim
    tables += config.vocab_size * config.hidden_dim
    return {"total": total, "non_embedding": total - tables}
