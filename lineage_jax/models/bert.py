"""BERT: a Transformer encoder that fills in words left out of a text, then learns any task.

Paper:       Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language
             Understanding", sections 3 and 4, appendix A. https://arxiv.org/abs/1810.04805
Builds on:   gpt.py, whose post-norm blocks (GPT-1) they are but for the causal mask.
What is new: every position reads every other, left and right; what is learned is which tokens were
             masked, and whether one sentence follows the other; a first token [CLS] stands for the
             whole, and one more linear map makes a classifier, a tagger or a finder of answers.
Departures:  documents packed in one row do not attend to each other (segment ids, which are not the
             paper's "segments": those are `types` here). Weights start normal; the released code
             cuts the normal at two standard deviations.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.nn import (
    MLP,
    Attention,
    Embed,
    LayerNorm,
    Linear,
    Mask,
    Remat,
    exact_gelu,
    stack,
)
from lineage_jax.typing import Array, Bool, Float, Int, Precision

Activation = Literal["gelu", "gelu_tanh", "relu"]
ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "gelu": exact_gelu,
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
"""x P(a standard normal is below x), exactly and by a hyperbolic tangent (Hendrycks and Gimpel
2016, section 2, arXiv 1606.08415); and max(x, 0)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """What must be chosen to build one BERT."""

    num_layers: int  # L
    embed_dim: int  # H
    """Width of the residual stream."""
    num_heads: int  # A
    vocab_size: int
    max_len: int
    """Longest sequence, in tokens, [CLS] and [SEP] included."""
    mlp_dim: int | None = None
    """Width of the feed-forward layer; 4 embed_dim if not given (section 3, footnote 3)."""
    num_types: int = 2
    """Rows of the table of types: sentence A and sentence B (section 3); 0 has no such table."""
    num_labels: int = 2
    """Labels that a classifier or tagger chooses among (K in section 4.1)."""
    activation: Activation = "gelu"
    """In the feed-forward layers and the head; section A.2 has GELU, the released models exact."""
    tied_embeddings: bool = True
    """Whether the table of tokens also scores them, as in the released code, or there are two."""
    dropout_rate: float = 0.0
    """On embeddings, attention weights, sublayers and what labels are read from; 0.1 in A.2."""
    init_std: float = 0.02
    """Standard deviation of the initial weights, as in the released models."""
    norm_epsilon: float = 1e-12
    """Added to the variance in each norm, as in the released models."""
    dtype: Precision = "float32"
    """Of activations; logits and statistics are float32."""
    param_dtype: Precision = "float32"
    remat: Remat = "none"
    """What the backward pass recomputes of a block (`lineage_jax.nn.stack`)."""
    unroll: int = 1
    """Layers in one iteration of the scan over depth."""

    def __post_init__(self):
        for name in ("num_layers", "embed_dim", "num_heads", "vocab_size", "max_len", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_types < 0:
            raise ValueError(f"num_types must be at least 0, got {self.num_types}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")

    @property
    def num_positions(self) -> int:
        """Rows of the table of positions."""
        return self.max_len


def bert_base() -> BertConfig:
    """Devlin et al. 2018, section 3: printed as 110 M parameters."""
    return bert(num_layers=12, embed_dim=768, num_heads=12)


def bert_large() -> BertConfig:
    """Devlin et al. 2018, section 3: printed as 340 M parameters, 335 M as released."""
    return bert(num_layers=24, embed_dim=1024, num_heads=16)


def bert(*, num_layers: int, embed_dim: int, num_heads: int) -> BertConfig:
    """A size of section 3, the context of section A.2, the vocabulary of the uncased release."""
    return BertConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        vocab_size=30_522,
        max_len=512,
        dropout_rate=0.1,
    )


class Block(nn.Module):
    """Attention both ways, then a feed-forward layer, each added to the stream, which is normed."""

    config: BertConfig
    train: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Mask, per_layer: None
    ) -> tuple[Float[Array, "B T D"], None]:
        c = self.config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        norm = functools.partial(LayerNorm, c.norm_epsilon, **types)
        drop = nn.Dropout(c.dropout_rate, deterministic=not self.train)
        attention = Attention(
            num_heads=c.num_heads,
            num_kv_heads=c.num_heads,
            head_dim=c.embed_dim // c.num_heads,
            stddev=c.init_std,
            out_stddev=c.init_std,
            dropout_rate=c.dropout_rate,
            name="attention",
            **types,
        )
        mlp_dim, activation = c.mlp_dim or 4 * c.embed_dim, ACTIVATIONS[c.activation]
        mlp = MLP(mlp_dim, activation, c.init_std, c.init_std, name="mlp", **types)
        attended, _ = attention(x, mask, mask.queries, None, self.train)
        x = norm(name="attention_norm")(x + drop(attended))
        x = norm(name="mlp_norm")(x + drop(mlp(x)))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation")), None


class Embeddings(nn.Module):
    """What a token is, where it is, and in which sentence: a sum, normed (section 3, figure 2)."""

    config: BertConfig
    table_dim: int

    def setup(self):
        c = self.config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        table = functools.partial(Embed, embed_dim=self.table_dim, stddev=c.init_std, **types)
        self.tokens = table(c.vocab_size)
        self.positions = table(c.num_positions, axis="position")
        if c.num_types:
            self.types = table(c.num_types, axis="position")
        self.norm = LayerNorm(c.norm_epsilon, **types)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        types: Int[Array, "B T"] | None,
        positions: Int[Array, "#B T"],
        train: bool,
    ) -> Float[Array, "B T D"]:
        x = self.tokens(tokens) + self.positions(positions)
        if self.config.num_types:
            x += self.types(jnp.zeros_like(tokens) if types is None else types)
        elif types is not None:
            raise ValueError("this model has no table of types (num_types=0), got types")
        return self.dropout(self.norm(x), deterministic=not train)


class Bert(nn.Module):
    """The encoder: a vector for each token, made of all tokens of its sequence."""

    config: BertConfig

    def setup(self):
        self.embeddings = Embeddings(self.config, self.table_dim())

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        types: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Maps token ids to the hidden states out of the last block.

        Args:
          tokens: ids in [0, vocab_size).
          types: which sentence a token belongs to, in [0, num_types); the first if not given.
          positions: rows of their table, in [0, num_positions); 0 ... T - 1 if not given, where
            T is at most max_len.
          segment_ids: which document of its row a token belongs to; one document if not given.
          mask: False for padding, which nothing reads; all may be read if not given.
          train: whether dropout acts; it then needs an rng named "dropout".

        Returns:
          Hidden states. Asked for intermediates, it gives them as "hidden", too, and what each
          block attended to as "weights", [L, B, H, T, T].

        Raises:
          ValueError: for too many tokens in a row, and for types where there is no table of them.
        """
        length = tokens.shape[1]
        if positions is None:
            if length > self.config.max_len:
                raise ValueError(
                    f"at most max_len={self.config.max_len} tokens a sequence, got {length}"
                )
            positions = self.positions(tokens)
        x = self.embeddings(tokens, types, positions, train)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))
        index = jnp.arange(length)[None]
        reads = Mask(index, index, segment_ids, segment_ids, readable=mask, causal=False)
        x = self.run_blocks(x, reads, train)
        self.sow("intermediates", "hidden", x)
        return x

    def table_dim(self) -> int:
        """Width of the tables: here the width of the residual stream."""
        return self.config.embed_dim

    def positions(self, tokens: Int[Array, "B T"]) -> Int[Array, "#B T"]:
        """Rows of the table of positions, where none are given."""
        return jnp.arange(tokens.shape[1])[None]

    def run_blocks(
        self, x: Float[Array, "B T D"], reads: Mask, train: bool
    ) -> Float[Array, "B T D"]:
        """The embeddings through all blocks in turn."""
        c = self.config
        blocks = stack(Block, c.num_layers, remat=c.remat, unroll=c.unroll)
        return blocks(c, train, name="blocks")(x, reads, None)[0]


class Pooler(nn.Module):
    """One vector for a sequence: tanh(W h + b) of its first token, as in the released code."""

    config: BertConfig
    activation: Callable[[Array], Array] = jnp.tanh

    @nn.compact
    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        dense = linear(self.config, hidden.shape[-1], self.config.embed_dim, "mlp", "dense")
        return self.activation(dense(hidden[:, 0]))


class MaskedLMHead(nn.Module):
    """Scores the vocabulary at each position (section 3.1, task 1).

    One more layer and norm, as in the released code, then inner products with the rows of the table
    of tokens, and a bias for each.
    """

    config: BertConfig
    activation: Activation

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B T D"], embeddings: Embeddings
    ) -> Float[Array, "B T V"]:
        c, width = self.config, embeddings.table_dim
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        x = linear(c, hidden.shape[-1], width, "mlp", "dense")(hidden)
        x = LayerNorm(c.norm_epsilon, name="norm", **types)(ACTIVATIONS[self.activation](x))
        table = embeddings.tokens
        if not c.tied_embeddings:
            table = Embed(c.vocab_size, width, "vocab", c.init_std, name="table", **types)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        bias: Any = self.param("bias", zeros, (c.vocab_size,), c.param_dtype)
        return table.attend(x) + bias.astype(jnp.float32)[None, None]


class Pooled(nn.Module):
    """The encoder, and one vector for the whole sequence. Called as the encoder is."""

    encoder: Bert

    @nn.compact
    def __call__(
        self, *inputs: Any, **named: Any
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
        hidden = self.encoder(*inputs, **named)
        return hidden, Pooler(self.encoder.config, name="pooler")(hidden)


class MaskedLM(nn.Module):
    """Scores which token stood at each position. Called as the encoder is."""

    encoder: Bert
    activation: Activation | None = None
    """In the head; the encoder's if not given."""

    @nn.compact
    def __call__(self, *inputs: Any, **named: Any) -> Float[Array, "B T V"]:
        c = self.encoder.config
        hidden = self.encoder(*inputs, **named)
        head = MaskedLMHead(c, self.activation or c.activation, name="masked_lm")
        return head(hidden, self.encoder.embeddings)


class PreTraining(nn.Module):
    """Scores tokens, and whether a pair of sentences is one (section 3.1). Called as the encoder.

    Of the pair's two scores the first is for "one follows the other" (IsNext), as released.
    """

    encoder: Bert

    @nn.compact
    def __call__(
        self, *inputs: Any, **named: Any
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B 2"]]:
        c = self.encoder.config
        hidden = self.encoder(*inputs, **named)
        tokens = MaskedLMHead(c, c.activation, name="masked_lm")(hidden, self.encoder.embeddings)
        pooled = Pooler(c, name="pooler")(hidden)
        return tokens, scores(c, 2, "pairs")(pooled)


class PairClassifier(nn.Module):
    """Scores whether a pair of sentences is one (section 3.1, task 2). Called as the encoder is."""

    encoder: Bert

    @nn.compact
    def __call__(self, *inputs: Any, **named: Any) -> Float[Array, "B 2"]:
        c = self.encoder.config
        return scores(c, 2, "pairs")(Pooler(c, name="pooler")(self.encoder(*inputs, **named)))


class SequenceClassifier(nn.Module):
    """Scores the labels of a whole sequence (section 4.1). Called as the encoder is.

    For one label of several, softmax; for several at once, a sigmoid each; for a number, one label.
    """

    encoder: Bert
    activation: Callable[[Array], Array] = jnp.tanh
    """After the pooler."""

    @nn.compact
    def __call__(self, *inputs: Any, train: bool = False, **named: Any) -> Float[Array, "B N"]:
        c = self.encoder.config
        hidden = self.encoder(*inputs, **{**named, "train": train})
        pooled = Pooler(c, self.activation, name="pooler")(hidden)
        pooled = nn.Dropout(c.dropout_rate, deterministic=not train)(pooled)
        return scores(c, c.num_labels, "classifier")(pooled)


class TokenClassifier(nn.Module):
    """Scores the labels of each token (section 5.3). Called as the encoder is."""

    encoder: Bert

    @nn.compact
    def __call__(self, *inputs: Any, train: bool = False, **named: Any) -> Float[Array, "B T N"]:
        c = self.encoder.config
        hidden = self.encoder(*inputs, **{**named, "train": train})
        hidden = nn.Dropout(c.dropout_rate, deterministic=not train)(hidden)
        return scores(c, c.num_labels, "classifier")(hidden)


class SpanFinder(nn.Module):
    """Scores where an answer starts and where it ends (section 4.2). Called as the encoder is."""

    encoder: Bert

    @nn.compact
    def __call__(
        self, *inputs: Any, **named: Any
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        ends = scores(self.encoder.config, 2, "ends")(self.encoder(*inputs, **named))  # B T 2
        return ends[..., 0], ends[..., 1]


def linear(config: BertConfig, inputs: int, outputs: int, axis: str, name: str) -> Linear:
    """A linear map from the residual stream, with the config's types and initial weights."""
    types: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.param_dtype)
    return Linear((inputs,), (outputs,), ("embed", axis), config.init_std, name=name, **types)


def scores(config: BertConfig, num_labels: int, name: str) -> Linear:
    """A linear map from the residual stream to float32 logits of so many labels."""
    types: dict[str, Any] = dict(dtype="float32", param_dtype=config.param_dtype)
    axes = ("embed", "vocab")  # labels are what it knows, as tokens are, and as rarely divide
    return Linear((config.embed_dim,), (num_labels,), axes, config.init_std, name=name, **types)


def num_params(model: nn.Module) -> int:
    """How many parameters a model has, such as `Pooled(Bert(bert_base()))`."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
