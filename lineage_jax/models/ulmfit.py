"""ULMFiT: a regularised LSTM language model, tuned in three stages into a classifier of text.

Paper:       Merity, Keskar and Socher 2017, "Regularizing and Optimizing LSTM Language Models",
             sections 2 and 4 (AWD-LSTM). https://arxiv.org/abs/1708.02182
             Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
             section 3 (ULMFiT). https://arxiv.org/abs/1801.06146
Builds on:   seq2seq.py, whose decoder of LSTMs is all there is, and reads no source.
What is new: weights that are dropped from the recurrent matrices, one mask a step of training; one
             mask a sequence for every other dropout; whole words dropped; the table of words scores
             them too. ULMFiT gives such a model, first trained on any text and then on that of its
             task, a head that reads a pool of all its outputs.
Departures:  a row starts from a state of zeros, as does each document in it: a batch is a function
             of its step alone. The papers carry the state on from batch to batch, and vary the
             length that gradients go back (Merity et al., section 4.1). A classifier has its
             document in one row, with gradients through all of it, and reads in one direction; the
             paper averages two, one of them trained on reversed text (Howard and Ruder, 3.3).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.nn import LSTM, Linear, LSTMState, UniformEmbed, lstm_cell, over_time
from lineage_jax.typing import Array, Bool, Float, Int, Precision

Cache = tuple[LSTMState, ...]
"""The state of each layer, from the lowest up: all that is known of the text before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULMFiTConfig:
    """What must be chosen to build one; rates of dropout are those of Merity et al., section 5."""

    num_layers: int
    embed_dim: int
    """Width of a word's vector, and units of the last layer, which scores words by them."""
    hidden_dim: int
    """Units of the other layers (section 4.5)."""
    vocab_size: int
    max_len: int
    """Tokens of a row at most, in training and in what is written; a recurrence sets no limit."""
    embed_dropout_rate: float = 0.1
    """Of words, wherever they stand in the batch (section 4.3)."""
    input_dropout_rate: float = 0.4
    """Of the numbers of a word's vector, the same all along a row (section 4.2)."""
    hidden_dropout_rate: float = 0.3
    """Of the same between two layers."""
    dropout_rate: float = 0.4
    """Of the same after the last layer, and before a classifier's first linear map."""
    weight_dropout_rate: float = 0.5
    """Of the weights from state to state (section 2)."""
    init_scale: float = 0.1
    """The table starts uniform in [-init_scale, init_scale]; an LSTM in 1 / sqrt(units) of zero."""
    dtype: Precision = "float32"
    """Of activations; logits, statistics and the cells of the LSTMs are float32."""
    param_dtype: Precision = "float32"

    def __post_init__(self):
        for name, value in vars(self).items():
            if (name.startswith("num_") or name.endswith(("_dim", "_size", "_len"))) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if name.endswith("dropout_rate") and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.init_scale <= 0:
            raise ValueError(f"init_scale must be more than 0, got {self.init_scale}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of each layer."""
        return (self.hidden_dim,) * (self.num_layers - 1) + (self.embed_dim,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ULMFiTConfig):
    """What must be chosen to build a classifier."""

    num_labels: int = 2
    classifier_dim: int = 50
    """Width between its two linear maps (Howard and Ruder, section 4.1)."""
    classifier_dropout_rate: float = 0.1
    """Before the second of them, as in the released code."""


def awd_lstm_ptb() -> ULMFiTConfig:
    """Merity et al. 2017, section 5, Penn Treebank: the 24 M parameters of table 1."""
    return awd_lstm(vocab_size=10_000)


def awd_lstm_wikitext2() -> ULMFiTConfig:
    """Merity et al. 2017, section 5, WikiText-2: the 33 M parameters of table 2."""
    return dataclasses.replace(awd_lstm(vocab_size=33_278), input_dropout_rate=0.65)


def ulmfit_2018() -> ULMFiTConfig:
    """Howard and Ruder 2018, section 4.1, with all words of WikiText-103.

    The paper does not say how many it kept; there are 267,735 (Merity et al. 2016, table 1).
    """
    return dataclasses.replace(awd_lstm(vocab_size=267_735), embed_dropout_rate=0.05)


def awd_lstm(*, vocab_size: int) -> ULMFiTConfig:
    """Merity et al. 2017, section 5: rows of 70 tokens, which there is a mean."""
    sizes: Any = dict(num_layers=3, embed_dim=400, hidden_dim=1150, max_len=70)
    return ULMFiTConfig(vocab_size=vocab_size, **sizes)


class Block(nn.Module):
    """An LSTM that loses some of the weights from its state to its next (section 2).

    One mask for all rows and all tokens, so that what runs through time is an LSTM like any other.
    """

    config: ULMFiTConfig
    units: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        state: LSTMState,
        opens: Bool[Array, "B T"] | None,
        mask: Bool[Array, "B T"] | None,
        train: bool,
    ) -> tuple[Float[Array, "B T N"], LSTMState]:
        """Its outputs, and its state after the last token.

        Args:
          x, state, mask: as for an `LSTM`.
          opens: True for the first token of a document, which knows of no state before.
          train: whether weights are dropped.
        """
        c, scale = self.config, 1 / math.sqrt(self.units)
        lstm = LSTM(self.units, scale, dtype=c.dtype, param_dtype=c.param_dtype, name="lstm")
        weights = lstm.weights(x.shape[-1])
        recurrent = nn.Dropout(c.weight_dropout_rate)(weights.recurrent, deterministic=not train)

        def step(state, at):
            projected, first = at
            if first is not None:
                state = jax.tree.map(lambda leaf: jnp.where(first[:, None], 0, leaf), state)
            state = lstm_cell(projected, state, recurrent)
            return state, state.hidden

        state, outputs = over_time(step, state, (weights.project(x), opens), mask)
        return outputs, state


class Encoder(nn.Module):
    """The table of words and the LSTMs that read them.

    Asked for intermediates, it gives "raw", [B, T, D], the outputs of the last layer, and "hidden",
    the same with dropout: what the penalties on activations are of.
    """

    config: ULMFiTConfig

    def setup(self):
        c = self.config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        self.embed = UniformEmbed(
            c.vocab_size, c.embed_dim, init_scale=c.init_scale, name="embed", **types
        )
        self.layers = [Block(c, n, name=f"layer_{i}") for i, n in enumerate(c.widths)]
        self.drop_words = nn.Dropout(c.embed_dropout_rate)
        along = dict(broadcast_dims=(1,))  # one mask for all tokens of a row
        self.drop_input = nn.Dropout(c.input_dropout_rate, **along)
        self.drop_hidden = nn.Dropout(c.hidden_dropout_rate, **along)
        self.drop_output = nn.Dropout(c.dropout_rate, **along)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The last layer's output at each token, and every layer's state after the last.

        Args:
          tokens: ids in [0, vocab_size).
          segment_ids: which document of its row a token belongs to; one document if not given.
          cache: before the first token; zeros if not given.
          mask: True for real tokens; all if not given.
          train: whether dropout acts; it then needs an rng named "dropout".
        """
        c, still = self.config, not train
        before = empty_cache(c, tokens.shape[0]) if cache is None else cache
        opens = None
        if segment_ids is not None:
            last = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
            opens = segment_ids != last
        x = self.embed(tokens)
        if train:
            kept = self.drop_words(jnp.ones(c.vocab_size, x.dtype), deterministic=False)
            x *= kept[tokens][..., None]
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))
        x, after = self.drop_input(x, deterministic=still), []
        for layer, (block, state) in enumerate(zip(self.layers, before, strict=True)):
            if layer:
                x = self.drop_hidden(x, deterministic=still)
            x, state = block(x, state, opens, mask, train)
            after.append(state)
        self.sow("intermediates", "raw", x)
        x = self.drop_output(x, deterministic=still)
        self.sow("intermediates", "hidden", x)
        return x, tuple(after)


class ULMFiT(nn.Module):
    """Scores every next token of a batch of sequences: the language model of stages one and two."""

    config: ULMFiTConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        train: bool = False,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Maps token ids in [0, V) to float32 logits; position t scores token t + 1.

        Args:
          tokens, segment_ids: as for the encoder.
          positions: of each token in its document; a recurrence does without them.
          cache: the states that the tokens go on from (`empty_cache`); zeros if not given.
          train: whether dropout acts; it then needs an rng named "dropout".
          mask: True for real tokens; the cache stays as it was at the others.

        Returns:
          The logits, and the cache with these tokens read (None if none was given).
        """
        c = self.config
        encoder = Encoder(c, name="encoder")
        x, after = encoder(tokens, segment_ids, cache, mask, train)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        bias: Any = self.param("bias", zeros, (c.vocab_size,), c.param_dtype)
        logits = encoder.embed.attend(x) + bias.astype(jnp.float32)[None, None]  # section 4.4
        return logits, None if cache is None else after


class Classifier(nn.Module):
    """Scores the labels of a text: stage three (Howard and Ruder, section 3.3).

    Batch norm counts in "batch_stats", which training has to carry along.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B N"]:
        """Maps token ids in [0, V) to float32 logits, one for each of N labels.

        Args:
          tokens, mask: as for the encoder.
          train: whether dropout acts, which then needs an rng named "dropout"; and whether a norm
            is of this batch, or of what it has counted.
        """
        c = self.config
        hidden, _ = Encoder(c, name="encoder")(tokens, mask=mask, train=train)
        real = jnp.ones(tokens.shape, bool) if mask is None else mask
        x = concat_pooled(hidden, real)
        # Labels are what it knows, as words are: their axis is called as that of words.
        for number, (rate, width, axes) in enumerate(
            (
                (c.dropout_rate, c.classifier_dim, ("embed", "embed_vector")),
                (c.classifier_dropout_rate, c.num_labels, ("embed_vector", "vocab")),
            )
        ):
            x = nn.relu(x) if number else x
            x = LinearBlock(c, rate, width, axes, name=f"block_{number}")(x, train)
        return x


class LinearBlock(nn.Module):
    """Batch norm, dropout and a linear map to float32: what a classifier has two of."""

    config: ULMFiTConfig
    rate: float
    width: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x: Float[Array, "B M"], train: bool) -> Float[Array, "B N"]:
        def named(init):
            return nn.with_logical_partitioning(init, ("embed_vector",))

        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,  # as in torch, and so is epsilon
            epsilon=1e-5,
            param_dtype=self.config.param_dtype,
            scale_init=named(nn.initializers.ones),
            bias_init=named(nn.initializers.zeros),
            name="norm",
        )
        width = x.shape[-1]
        std = 1 / math.sqrt(3 * width)  # of torch's uniform start
        types: dict[str, Any] = dict(param_dtype=self.config.param_dtype)
        linear = Linear((width,), (self.width,), self.axes, std, name="linear", **types)
        return linear(nn.Dropout(self.rate)(norm(x), deterministic=not train))


def concat_pooled(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B 3*D"]:
    """[h_T, maxpool(H), meanpool(H)] over the real tokens of each row (section 3.3); float32.

    Args:
      hidden: outputs of the last layer.
      mask: True for real tokens; a row without any has a pool that means nothing, but is finite.
    """
    hidden, real = hidden.astype(jnp.float32), mask[..., None]
    end = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    last = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
    count = mask.sum(1, keepdims=True)
    largest = jnp.where(real, hidden, -jnp.inf).max(1)
    largest = jnp.where(count > 0, largest, 0.0)
    mean = jnp.where(real, hidden, 0.0).sum(1) / jnp.maximum(count, 1)
    return jnp.concatenate([last, largest, mean], axis=-1)


def empty_cache(config: ULMFiTConfig, batch_size: int, length: int | None = None) -> Cache:
    """States of zeros for `batch_size` rows; a recurrence needs no room for their `length`."""
    types = (config.dtype, jnp.float32)
    shapes = [(batch_size, units) for units in config.widths]
    return tuple(LSTMState(*(jnp.zeros(shape, dtype) for dtype in types)) for shape in shapes)


def num_params(config: ULMFiTConfig) -> dict[str, int]:
    """How many parameters the language model has: "total", and "non_embedding" without the table.

    Biases are counted once; torch has two of each, one beside each matrix.
    """
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(ULMFiT(config).init, jax.random.key(0), ids)["params"]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return {"total": total, "non_embedding": total - config.vocab_size * config.embed_dim}
