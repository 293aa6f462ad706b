"""The Transformer: a translator of attention and feed-forward layers alone.

Paper:       Vaswani et al. 2017, "Attention Is All You Need", sections 3 and 5.4, table 3.
             https://arxiv.org/abs/1706.03762
Builds on:   the recurrent translators with attention (Bahdanau et al. 2014; Luong et al. 2015).
What is new: no recurrence: several heads of attention in place of one, within each sentence too;
             residual connections around every sublayer, a norm after each; positions as sines and
             cosines; one table for both languages and for the scores.
Departures:  sines and cosines stand in two halves (`lineage_jax.nn.sinusoids`). The paper does not
             print how weights start: normal, by Glorot and Bengio 2010. Options of Marian's
             translators (Junczys-Dowmunt et al. 2018): SiLU, a bias of the scores. The target may
             read itself by Native Sparse Attention (Yuan et al. 2025, native_sparse.py).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.kernels import NSAConfig
from lineage_jax.nn import (
    MLP,
    Attention,
    AttentionName,
    CrossAttention,
    DecoderCache,
    Embed,
    KVCache,
    LayerNorm,
    Mask,
    NativeSparseAttention,
    Remat,
    check_attention,
    decoder_mask,
    exact_gelu,
    nsa_caches,
    sinusoids,
    stack,
)
from lineage_jax.typing import Array, Bool, Float, Int, Precision, Shaped

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": exact_gelu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """The size of the encoder, or of the decoder."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    """Width of the feed-forward layer, d_ff."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What must be chosen to build one Transformer."""

    encoder: StackConfig
    decoder: StackConfig
    embed_dim: int
    """Width of the residual stream, d_model."""
    source_vocab_size: int
    vocab_size: int
    """Of the target."""
    max_len: int
    """Longest sequence, in tokens."""
    shared_embeddings: bool = True
    """Whether one table is both languages' (section 3.4), which then have one vocabulary."""
    tied_embeddings: bool = True
    """Whether the target's table also scores its tokens (section 3.4)."""
    scaled_embeddings: bool = True
    """Whether rows of the tables are multiplied by sqrt(embed_dim) (section 3.4)."""
    activation: Literal["relu", "silu", "gelu"] = "relu"
    """Of the feed-forward layers (section 3.3)."""
    attention: AttentionName = "full"
    """What the target reads itself by. The source, which is not causal, is read in full by both."""
    sparse: NSAConfig = dataclasses.field(default_factory=NSAConfig)
    """What native_sparse reads, in positions; full attention has no use for it."""
    score_bias: bool = False
    """Whether each token has a bias of its score, as in Marian's translators."""
    dropout_rate: float = 0.1
    """On the sums of embeddings and positions, and on each sublayer (section 5.4)."""
    norm_epsilon: float = 1e-6
    """Added to the variance in each norm: the authors' code, tensor2tensor."""
    dtype: Precision = "float32"
    """Of activations; logits and statistics are float32."""
    param_dtype: Precision = "float32"
    remat: Remat = "none"
    """What the backward pass recomputes of a block (`lineage_jax.nn.stack`)."""
    unroll: int = 1
    """Layers in one iteration of the scans over depth."""

    def __post_init__(self):
        for name in ("embed_dim", "source_vocab_size", "vocab_size", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for side in ("encoder", "decoder"):
            sizes = getattr(self, side)
            for name, value in dataclasses.asdict(sizes).items():
                if value < 1:
                    raise ValueError(f"{side}.{name} must be at least 1, got {value}")
            if self.embed_dim % sizes.num_heads:
                raise ValueError(
                    f"{side}.num_heads={sizes.num_heads} must divide embed_dim={self.embed_dim}"
                )
        if self.shared_embeddings and self.source_vocab_size != self.vocab_size:
            raise ValueError(
                "shared_embeddings need one vocabulary, got "
                f"source_vocab_size={self.source_vocab_size} and vocab_size={self.vocab_size}"
            )
        check_attention(self.attention)
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")


def transformer_base() -> TransformerConfig:
    """Vaswani et al. 2017, table 3, first row: printed as 65 M parameters, 63 M with 37,000 tokens.

    So many tokens are English and German's (section 5.1).
    """
    return transformer(embed_dim=512, num_heads=8, mlp_dim=2048, dropout_rate=0.1)


def transformer_big() -> TransformerConfig:
    """Vaswani et al. 2017, table 3, last row: printed as 213 M parameters, 214 M as built."""
    return transformer(embed_dim=1024, num_heads=16, mlp_dim=4096, dropout_rate=0.3)


def transformer(
    *, embed_dim: int, num_heads: int, mlp_dim: int, dropout_rate: float
) -> TransformerConfig:
    """Six layers on either side, as in all of table 3 but its rows C.

    The paper prints no longest sentence: 256 tokens are those of tensor2tensor's settings.
    """
    side = StackConfig(num_layers=6, num_heads=num_heads, mlp_dim=mlp_dim)
    return TransformerConfig(
        encoder=side,
        decoder=side,
        embed_dim=embed_dim,
        source_vocab_size=37_000,
        vocab_size=37_000,
        max_len=256,
        dropout_rate=dropout_rate,
    )


class Cache(NamedTuple):
    """What the decoder keeps between two tokens.

    Attributes:
      past: keys and values of the target so far, of each layer (`DecoderCache`).
      memory: keys and values of the source, of each layer.
      source_mask: False for the source's padding.
    """

    past: Any
    memory: KVCache
    source_mask: Bool[Array, "B S"]


class Sublayers(nn.Module):
    """What the blocks of both sides are made of: sublayers, each followed by a norm."""

    config: TransformerConfig
    train: bool = False

    @nn.nowrap
    def attention(self, kind: type[nn.Module], sizes: StackConfig, name: str, **others: Any) -> Any:
        c = self.config
        return kind(
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_heads,
            head_dim=c.embed_dim // sizes.num_heads,
            stddev=glorot(c.embed_dim, c.embed_dim),
            out_stddev=glorot(c.embed_dim, c.embed_dim),
            use_bias=True,
            name=name,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            **others,
        )

    @nn.nowrap
    def feed_forward(self, x: Float[Array, "B T D"], sizes: StackConfig) -> Float[Array, "B T D"]:
        c = self.config
        std = glorot(c.embed_dim, sizes.mlp_dim)
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        mlp = MLP(sizes.mlp_dim, ACTIVATIONS[c.activation], std, std, name="mlp", **types)
        return self.add(x, mlp(x), "mlp_norm")

    @nn.nowrap
    def add(
        self, x: Float[Array, "B T D"], sublayer: Float[Array, "B T D"], name: str
    ) -> Float[Array, "B T D"]:
        """LayerNorm(x + Sublayer(x)) (section 3.1)."""
        c = self.config
        norm = LayerNorm(c.norm_epsilon, c.dtype, c.param_dtype, name=name)
        drop = nn.Dropout(c.dropout_rate, deterministic=not self.train)
        return norm(x + drop(sublayer))


class EncoderBlock(Sublayers):
    """Attention within the source, then a feed-forward layer."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], shared: tuple[Int[Array, "#B S"], Mask], per_layer: None
    ) -> tuple[Float[Array, "B S D"], None]:
        positions, mask = shared
        sizes = self.config.encoder
        attended, _ = self.attention(Attention, sizes, "attention")(x, mask, positions)
        x = self.add(x, attended, "attention_norm")
        x = self.feed_forward(x, sizes)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation")), None


class DecoderBlock(Sublayers):
    """Attention within the target, then to the source, then a feed-forward layer."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: tuple[Int[Array, "#B T"], Mask, Float[Array, "B S D"] | None, Mask],
        per_layer: tuple[DecoderCache, KVCache] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[DecoderCache, KVCache] | None]:
        positions, mask, source, source_mask = shared
        past, memory = per_layer or (None, None)
        sizes = self.config.decoder
        attended, past = self.within_target(sizes)(x, mask, positions, past)
        x = self.add(x, attended, "attention_norm")
        cross = self.attention(CrossAttention, sizes, "cross_attention")
        attended, memory = cross(x, source, source_mask, memory)
        x = self.add(x, attended, "cross_attention_norm")
        x = self.feed_forward(x, sizes)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))
        return x, None if per_layer is None else (past, memory)

    @nn.nowrap
    def within_target(self, sizes: StackConfig) -> Any:
        """What the target reads itself by."""
        if self.config.attention == "full":
            return self.attention(Attention, sizes, "attention")
        width = self.config.embed_dim // sizes.num_heads
        others = dict(value_dim=width, hidden_dim=width, sparse=self.config.sparse)
        return self.attention(NativeSparseAttention, sizes, "attention", **others)


class Encoder(nn.Module):
    """Reads the source, every position of it at every other."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "B S"] | None, train: bool
    ) -> Float[Array, "B S D"]:
        c = self.config
        index = jnp.arange(x.shape[1])[None]
        blocks = stack(EncoderBlock, c.encoder.num_layers, remat=c.remat, unroll=c.unroll)
        shared = index, Mask(index, index, readable=mask, causal=False)
        x, _ = blocks(c, train, name="blocks")(x, shared, None)
        return x


class Decoder(nn.Module):
    """Writes the target, each position of it reading those before and all of the source."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], shared: Any, per_layer: Any, train: bool
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config
        blocks = stack(DecoderBlock, c.decoder.num_layers, remat=c.remat, unroll=c.unroll)
        return blocks(c, train, name="blocks")(x, shared, per_layer)


class Transformer(nn.Module):
    """Scores every next token of a translation.

    Asked for intermediates, it gives "encoded" and "hidden" too: what the encoder and the decoder
    return.
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        std, types = c.embed_dim**-0.5, dict(dtype=c.dtype, param_dtype=c.param_dtype)
        self.embed = Embed(c.vocab_size, c.embed_dim, "vocab", std, **types)
        if not c.shared_embeddings:
            self.source_embed = Embed(c.source_vocab_size, c.embed_dim, "vocab", std, **types)
        if not c.tied_embeddings:
            self.head = Embed(c.vocab_size, c.embed_dim, "vocab", std, **types)
        if c.score_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.bias = self.param("score_bias", init, (c.vocab_size,), c.param_dtype)
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self,
        source: Int[Array, "B S"],
        tokens: Int[Array, "B T"],
        source_mask: Bool[Array, "B S"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """Float32 logits; position t, which has read target tokens 0 ... t, scores token t + 1.

        Args:
          source: ids in [0, source_vocab_size).
          tokens: of the target, after a token that starts it; ids in [0, vocab_size).
          source_mask: False for padding of the source.
          mask: False for padding of the target, which nothing reads; right-padded rows need none.
          train: whether dropout acts; it then needs an rng named "dropout".
        """
        encoded = self.encode(source, source_mask, train)
        positions, reads = decoder_mask(
            tokens.shape[1], self.config.max_len, None, None, None, mask
        )
        shared = positions, reads, encoded, to_source(tokens, source, source_mask)
        x, _ = self.decoder(self.placed(self.embed, tokens, positions, train), shared, None, train)
        return self.score(x)

    def encode(
        self, source: Int[Array, "B S"], mask: Bool[Array, "B S"] | None, train: bool = False
    ) -> Float[Array, "B S D"]:
        """What the encoder makes of the source."""
        c, length = self.config, source.shape[1]
        if length > c.max_len:
            raise ValueError(f"at most max_len={c.max_len} tokens of the source, got {length}")
        table = self.embed if c.shared_embeddings else self.source_embed
        x = self.placed(table, source, jnp.arange(length)[None], train)
        encoded = self.encoder(x, mask, train)
        self.sow("intermediates", "encoded", encoded)
        return encoded

    def start(
        self,
        source: Int[Array, "B S"],
        source_mask: Bool[Array, "B S"] | None = None,
        length: int = 1,
    ) -> Cache:
        """The source read, and room for `length` tokens of the target."""
        c, encoded = self.config, self.encode(source, source_mask)
        rows, size = source.shape
        if source_mask is None:
            source_mask = jnp.ones(source.shape, bool)
        width = c.embed_dim // c.decoder.num_heads

        def room(length: int, attention: AttentionName = "full") -> Any:
            shape = (c.decoder.num_layers, rows, length, c.decoder.num_heads, width)
            if attention == "native_sparse":
                return nsa_caches(*shape, width, c.dtype, c.sparse)
            return KVCache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))

        # Any token at the first place, which the first real one is written over: the keys and
        # values of the source are all that is wanted of it.
        first = jnp.zeros((rows, 1), jnp.int32)
        cache = Cache(room(length, c.attention), room(size), source_mask)
        return self.decode_from(first, first, cache, encoded)[1]

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Logits of the tokens that follow these, which are written to the cache.

        Args:
          tokens: of the target, at `positions`.
          positions: in [0, length) of `start`.
          cache: of `start`, and of the calls since.
          mask: as recurrences take it, and native_sparse; padding on the right is never read, and
            what comes later is written over it.
        """
        return self.decode_from(tokens, positions, cache, None, mask)

    def decode_from(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
        encoded: Float[Array, "B S D"] | None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """As `decode`; with what the encoder made of the source, its keys and values are made."""
        length = tokens.shape[1]
        _, reads = decoder_mask(length, self.config.max_len, positions, None, cache.past)
        if self.config.attention == "native_sparse":
            reads = dataclasses.replace(reads, readable=mask)  # for what a cache compresses later
        sources = to_source(tokens, cache.source_mask, cache.source_mask)
        shared = positions, reads, encoded, sources
        x = self.placed(self.embed, tokens, positions, train=False)
        x, (past, memory) = self.decoder(x, shared, (cache.past, cache.memory), False)
        return self.score(x), Cache(past, memory, cache.source_mask)

    def placed(
        self, table: Embed, ids: Int[Array, "B T"], positions: Int[Array, "#B T"], train: bool
    ) -> Float[Array, "B T D"]:
        """The rows of the ids, and where they stand."""
        c = self.config
        x = table(ids) * (math.sqrt(c.embed_dim) if c.scaled_embeddings else 1.0)
        x = x + sinusoids(positions, c.embed_dim).astype(x.dtype)
        x = self.dropout(x, deterministic=not train)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))

    def score(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        self.sow("intermediates", "hidden", x)
        logits = (self.embed if self.config.tied_embeddings else self.head).attend(x)
        if self.config.score_bias:
            logits += self.bias.astype(jnp.float32).reshape(1, 1, -1)
        return logits


def to_source(
    tokens: Shaped[Array, "B T"], source: Shaped[Array, "B S"], mask: Bool[Array, "B S"] | None
) -> Mask:
    """Every position of the target reads every one of the source that is not padding."""
    target_index, source_index = (jnp.arange(x.shape[1])[None] for x in (tokens, source))
    return Mask(target_index, source_index, readable=mask, causal=False)


def glorot(width_in: int, width_out: int) -> float:
    """Standard deviation of a matrix that keeps variances in both directions.

    Glorot and Bengio 2010, equation 12.
    """
    return math.sqrt(2 / (width_in + width_out))


def num_params(config: TransformerConfig) -> dict[str, int]:
    """How many parameters there are: "total", and "non_embedding", without the tables."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), ids, ids)["params"]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    c = config
    sizes = [c.vocab_size]
    if not c.shared_embeddings:
        sizes.append(c.source_vocab_size)
    if not c.tied_embeddings:
        sizes.append(c.vocab_size)
    return {"total": total, "non_embedding": total - sum(sizes) * c.embed_dim}
