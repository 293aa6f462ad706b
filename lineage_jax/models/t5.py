"""T5: every task as text in and text out, learned by filling in what was left out of a text.

Paper:       Raffel et al. 2019, "Exploring the Limits of Transfer Learning with a Unified
             Text-to-Text Transformer", sections 2.1 and 3.7. https://arxiv.org/abs/1910.10683
             Version 1.1 as released, with the gated feed-forward layers of Shazeer 2020,
             "GLU Variants Improve Transformer", section 2 (arXiv 2002.05202).
Builds on:   transformer.py, the encoder-decoder.
What is new: no positions in the stream: each head adds to its scores a number for the distance
             between query and key, the same in all layers of a stack. Norms before each sublayer
             and after the last, without a mean; no biases in linear maps. The objective is in
             `lineage_jax.data.span_corruption`.
Departures:  scores are divided by sqrt(head_dim). The authors divide the query's initial weights
             by it instead: the same scores, of parameters that are larger here by that factor. The
             paper does not print how weights start: normal, with the variances that `transformers`
             has from the authors' code; a head of its own as in T5X (Roberts et al. 2022).
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.models.transformer import Cache, to_source
from lineage_jax.nn import (
    Attention,
    CrossAttention,
    Embed,
    KVCache,
    Linear,
    Mask,
    Remat,
    RMSNorm,
    stack,
)
from lineage_jax.typing import Array, Bool, Float, Int, Precision

FeedForwardKind = Literal["relu", "geglu", "swiglu"]
ACTIVATIONS: Mapping[FeedForwardKind, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "geglu": nn.gelu,  # by a hyperbolic tangent, as released
    "swiglu": nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """What must be chosen to build one T5."""

    num_encoder_layers: int
    num_decoder_layers: int
    embed_dim: int
    """Width of the residual stream, d_model."""
    num_heads: int
    head_dim: int
    """Width of one head, d_kv; heads together need not be as wide as the stream."""
    mlp_dim: int
    """Width of the feed-forward layers, d_ff."""
    vocab_size: int
    """Of source and target, sentinels included."""
    num_buckets: int = 32
    """Kinds of distance that a head tells apart (section 2.1)."""
    max_distance: int = 128
    """From here on all distances are of one kind (section 2.1)."""
    feed_forward: FeedForwardKind = "relu"
    """max(0, x W1) W2 (section 2.1), or gated by a GELU (version 1.1) or SiLU (Shazeer 2020)."""
    tied_embeddings: bool = True
    """Whether the table of tokens also scores them, from states divided by sqrt(embed_dim), or
    there is a second table, for states as they are (version 1.1)."""
    dropout_rate: float = 0.1
    """On weights of attention, within feed-forward layers, on sublayers, and before and after each
    stack (sections 2.1 and 3.1.1; version 1.1 was pre-trained without)."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in each norm, as released."""
    dtype: Precision = "float32"
    """Of activations; logits and statistics are float32."""
    param_dtype: Precision = "float32"
    remat: Remat = "none"
    """What the backward pass recomputes of a block (`lineage_jax.nn.stack`)."""
    unroll: int = 1
    """Layers in one iteration of the scans over depth."""

    def __post_init__(self):
        sizes = ("num_encoder_layers", "num_decoder_layers", "embed_dim", "num_heads", "head_dim")
        for name in (*sizes, "mlp_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_buckets < 4:
            raise ValueError(f"num_buckets must be at least 4, got {self.num_buckets}")
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"max_distance must be more than num_buckets / 2 = {self.num_buckets // 2}, "
                f"got {self.max_distance}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")


def t5_small() -> T5Config:
    """Raffel et al. 2019, section 3.7: about 60 M parameters."""
    return t5(num_layers=6, embed_dim=512, num_heads=8, head_dim=64, mlp_dim=2048)


def t5_base() -> T5Config:
    """Raffel et al. 2019, sections 3.1.1 and 3.7: about 220 M parameters."""
    return t5(num_layers=12, embed_dim=768, num_heads=12, head_dim=64, mlp_dim=3072)


def t5_large() -> T5Config:
    """Raffel et al. 2019, section 3.7: about 770 M parameters, 738 M as released."""
    return t5(num_layers=24, embed_dim=1024, num_heads=16, head_dim=64, mlp_dim=4096)


def t5_3b() -> T5Config:
    """Raffel et al. 2019, section 3.7: about 2.8 B parameters."""
    return t5(num_layers=24, embed_dim=1024, num_heads=32, head_dim=128, mlp_dim=16_384)


def t5_11b() -> T5Config:
    """Raffel et al. 2019, section 3.7: about 11 B parameters."""
    return t5(num_layers=24, embed_dim=1024, num_heads=128, head_dim=128, mlp_dim=65_536)


def t5(
    *, num_layers: int, embed_dim: int, num_heads: int, head_dim: int, mlp_dim: int, **others: Any
) -> T5Config:
    """Any size of section 3.7: as many layers on either side.

    Section 3.1.3 prints a vocabulary of 32,000; 100 sentinels are added to it, and the tables are
    filled up to 32,128 rows, as released.
    """
    return T5Config(
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        vocab_size=32_128,
        **others,
    )


def t5_v1_1_small() -> T5Config:
    """Version 1.1 as released, small: 77 M parameters."""
    return t5_v1_1(num_layers=8, embed_dim=512, num_heads=6, mlp_dim=1024)


def t5_v1_1_base() -> T5Config:
    """Version 1.1 as released, base: 248 M parameters."""
    return t5_v1_1(num_layers=12, embed_dim=768, num_heads=12, mlp_dim=2048)


def t5_v1_1_large() -> T5Config:
    """Version 1.1 as released, large: 783 M parameters."""
    return t5_v1_1(num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=2816)


def t5_v1_1_xl() -> T5Config:
    """Version 1.1 as released, XL: 2.85 B parameters."""
    return t5_v1_1(num_layers=24, embed_dim=2048, num_heads=32, mlp_dim=5120)


def t5_v1_1_xxl() -> T5Config:
    """Version 1.1 as released, XXL: 11.1 B parameters."""
    return t5_v1_1(num_layers=24, embed_dim=4096, num_heads=64, mlp_dim=10_240)


def t5_v1_1(*, num_layers: int, embed_dim: int, num_heads: int, mlp_dim: int) -> T5Config:
    """Any size of version 1.1, as it was pre-trained: without dropout.

    The authors' page of released checkpoints,
    https://github.com/google-research/text-to-text-transfer-transformer
    """
    return t5(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=64,
        mlp_dim=mlp_dim,
        feed_forward="geglu",
        tied_embeddings=False,
        dropout_rate=0.0,
    )


def buckets_of_distances(num_buckets: int, max_distance: int) -> list[int]:
    """The bucket of each distance from 0 to max_distance, where all that are longer are too.

    Half of the buckets hold one distance each; the others grow with it, up to max_distance (section
    2.1). As released, a distance d >= m = num_buckets // 2 is in bucket

        m + floor((num_buckets - m) log(d / m) / log(max_distance / m))

    but the last at most. It is counted here in integers, in which no logarithm can be rounded to
    the other side of a border: with k = num_buckets - m, the floor is at least j where
    d^k >= m^(k - j) max_distance^j.
    """
    exact = num_buckets // 2
    grown = num_buckets - exact
    borders = [exact ** (grown - j) * max_distance**j for j in range(1, grown)]
    return [
        distance if distance < exact else exact + bisect.bisect_right(borders, distance**grown)
        for distance in range(max_distance + 1)
    ]


def relative_buckets(
    queries: Int[Array, "#B T"],
    keys: Int[Array, "#B S"],
    *,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
) -> Int[Array, "#B T S"]:
    """The bucket of the distance from each query to each key.

    Args:
      queries, keys: positions, in tokens.
      bidirectional: whether keys after the query are told from those before it, in the second half
        of the buckets; or else they are of the first bucket, as nothing reads them.
      num_buckets: in all.
      max_distance: from which on all is one bucket, in tokens.
    """
    after = keys[:, None, :] - queries[:, :, None]  # B T S
    side = num_buckets // 2 if bidirectional else num_buckets
    of_distance = jnp.asarray(buckets_of_distances(side, max_distance), jnp.int32)
    distance = jnp.abs(after) if bidirectional else jnp.maximum(-after, 0)
    bucket = of_distance[jnp.minimum(distance, max_distance)]
    return bucket + side * (after > 0) if bidirectional else bucket


class RelativeBias(nn.Module):
    """What the distance of a key from a query adds to each head's score, from a learned table."""

    config: T5Config

    @nn.compact
    def __call__(self, mask: Mask) -> Float[Array, "#B H T S"]:
        """In float32; of all layers of the stack in which that mask holds."""
        c = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.embed_dim**-0.5), ("position", "heads")
        )
        table: Any = self.param("table", init, (c.num_buckets, c.num_heads), c.param_dtype)
        buckets = relative_buckets(
            mask.queries,
            mask.keys,
            bidirectional=not mask.causal,
            num_buckets=c.num_buckets,
            max_distance=c.max_distance,
        )
        return jnp.take(table.T.astype(jnp.float32), buckets, axis=1).swapaxes(0, 1)


class FeedForward(nn.Module):
    """f(x W1) W2, or, gated, (f(x W) * x V) W2; no bias (section 2.1; Shazeer 2020, equation 6)."""

    config: T5Config
    train: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, std = self.config, self.config.embed_dim**-0.5
        types: dict[str, Any] = dict(use_bias=False, dtype=c.dtype, param_dtype=c.param_dtype)
        into, back, f = ("embed", "mlp"), ("mlp", "embed"), ACTIVATIONS[c.feed_forward]
        hidden = Linear((c.embed_dim,), (c.mlp_dim,), into, std, name="up", **types)(x)
        if c.feed_forward == "relu":
            hidden = f(hidden)
        else:
            hidden *= f(Linear((c.embed_dim,), (c.mlp_dim,), into, std, name="gate", **types)(x))
        hidden = nn.Dropout(c.dropout_rate, deterministic=not self.train)(hidden)
        std = c.mlp_dim**-0.5
        return Linear((c.mlp_dim,), (c.embed_dim,), back, std, name="down", **types)(hidden)


class Sublayers(nn.Module):
    """What the blocks of both sides are made of: norms, and sublayers added to the stream."""

    config: T5Config
    train: bool = False

    @nn.nowrap
    def norm(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B T D"]:
        c = self.config
        return RMSNorm(c.norm_epsilon, c.dtype, c.param_dtype, name=name)(x)

    @nn.nowrap
    def attention(self, kind: type[Attention], name: str) -> Any:
        c = self.config
        return kind(
            num_heads=c.num_heads,
            num_kv_heads=c.num_heads,
            head_dim=c.head_dim,
            stddev=c.embed_dim**-0.5,
            out_stddev=(c.num_heads * c.head_dim) ** -0.5,
            use_bias=False,
            dropout_rate=c.dropout_rate,
            name=name,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
        )

    @nn.nowrap
    def add(
        self, x: Float[Array, "B T D"], sublayer: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """x + Dropout(Sublayer(Norm(x)))."""
        return x + nn.Dropout(self.config.dropout_rate, deterministic=not self.train)(sublayer)

    @nn.nowrap
    def feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        mlp = FeedForward(self.config, self.train, name="mlp")
        x = self.add(x, mlp(self.norm(x, "mlp_norm")))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))


class EncoderBlock(Sublayers):
    """Attention within the source, then a feed-forward layer."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        shared: tuple[Mask, Float[Array, "#B H S S"]],
        per_layer: None,
    ) -> tuple[Float[Array, "B S D"], None]:
        mask, bias = shared
        attention = self.attention(Attention, "attention")
        normed = self.norm(x, "attention_norm")
        attended, _ = attention(normed, mask, mask.queries, None, self.train, bias)
        return self.feed_forward(self.add(x, attended)), None


class DecoderBlock(Sublayers):
    """Attention within the target, then to the source, then a feed-forward layer."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: tuple[Mask, Float[Array, "#B H T past"], Float[Array, "B S D"] | None, Mask],
        per_layer: tuple[KVCache, KVCache] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[KVCache, KVCache] | None]:
        mask, bias, source, source_mask = shared
        past, memory = per_layer or (None, None)
        attention = self.attention(Attention, "attention")
        normed = self.norm(x, "attention_norm")
        attended, past = attention(normed, mask, mask.queries, past, self.train, bias)
        x = self.add(x, attended)
        cross = self.attention(CrossAttention, "cross_attention")
        normed = self.norm(x, "cross_attention_norm")
        attended, memory = cross(normed, source, source_mask, memory, self.train)
        x = self.feed_forward(self.add(x, attended))
        return x, None if per_layer is None else (past, memory)


class Encoder(nn.Module):
    """Reads the source, every position of it at every other."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "B S"] | None, train: bool
    ) -> Float[Array, "B S D"]:
        c = self.config
        index = jnp.arange(x.shape[1])[None]
        reads = Mask(index, index, readable=mask, causal=False)
        bias = RelativeBias(c, name="relative_bias")(reads)
        blocks = stack(EncoderBlock, c.num_encoder_layers, remat=c.remat, unroll=c.unroll)
        x, _ = blocks(c, train, name="blocks")(x, (reads, bias), None)
        return RMSNorm(c.norm_epsilon, c.dtype, c.param_dtype, name="final_norm")(x)


class Decoder(nn.Module):
    """Writes the target, each position of it reading those before and all of the source."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        reads: Mask,
        source: Float[Array, "B S D"] | None,
        source_mask: Mask,
        per_layer: tuple[KVCache, KVCache] | None,
        train: bool,
    ) -> tuple[Float[Array, "B T D"], tuple[KVCache, KVCache] | None]:
        c = self.config
        bias = RelativeBias(c, name="relative_bias")(reads)
        blocks = stack(DecoderBlock, c.num_decoder_layers, remat=c.remat, unroll=c.unroll)
        shared = reads, bias, source, source_mask
        x, caches = blocks(c, train, name="blocks")(x, shared, per_layer)
        return RMSNorm(c.norm_epsilon, c.dtype, c.param_dtype, name="final_norm")(x), caches


class T5(nn.Module):
    """Scores every next token of a target text.

    Asked for intermediates, it gives "encoded" and "hidden" too: what the encoder and the decoder
    return.
    """

    config: T5Config

    def setup(self):
        c = self.config
        types = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        self.embed = Embed(c.vocab_size, c.embed_dim, "vocab", 1.0, **types)
        if not c.tied_embeddings:
            self.head = Embed(c.vocab_size, c.embed_dim, "vocab", c.embed_dim**-0.5, **types)
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
          source: ids in [0, vocab_size).
          tokens: of the target, after a token that starts it; ids in [0, vocab_size).
          source_mask: False for padding of the source.
          mask: False for padding of the target, which nothing reads; right-padded rows need none.
          train: whether dropout acts; it then needs an rng named "dropout".
        """
        encoded = self.encode(source, source_mask, train)
        index = jnp.arange(tokens.shape[1])[None]
        reads, sources = Mask(index, index, readable=mask), to_source(tokens, source, source_mask)
        x = self.embedded(tokens, train)
        x, _ = self.decoder(x, reads, encoded, sources, None, train)
        return self.score(x, train)

    def encode(
        self, source: Int[Array, "B S"], mask: Bool[Array, "B S"] | None, train: bool = False
    ) -> Float[Array, "B S D"]:
        """What the encoder makes of the source."""
        encoded = self.encoder(self.embedded(source, train), mask, train)
        encoded = self.dropout(encoded, deterministic=not train)
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

        def room(length: int) -> KVCache:
            shape = (c.num_decoder_layers, rows, length, c.num_heads, c.head_dim)
            return KVCache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))

        # As the Transformer does: of any token at the first place, which the first real one is
        # written over, the keys and values of the source are all that is wanted.
        first = jnp.zeros((rows, 1), jnp.int32)
        cache = Cache(room(length), room(size), source_mask)
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
          mask: as recurrences take it; padding on the right is never read, and what comes later is
            written over it.
        """
        return self.decode_from(tokens, positions, cache, None)

    def decode_from(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
        encoded: Float[Array, "B S D"] | None,
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """As `decode`; with what the encoder made of the source, its keys and values are made."""
        reads = Mask(positions, jnp.arange(cache.past.keys.shape[2])[None])
        sources = to_source(tokens, cache.source_mask, cache.source_mask)
        x = self.embedded(tokens, train=False)
        per_layer = cache.past, cache.memory
        x, (past, memory) = self.decoder(x, reads, encoded, sources, per_layer, False)
        return self.score(x, train=False), Cache(past, memory, cache.source_mask)

    def embedded(self, ids: Int[Array, "B T"], train: bool) -> Float[Array, "B T D"]:
        x = self.dropout(self.embed(ids), deterministic=not train)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))

    def score(self, x: Float[Array, "B T D"], train: bool) -> Float[Array, "B T V"]:
        x = self.dropout(x, deterministic=not train)
        self.sow("intermediates", "hidden", x)
        if self.config.tied_embeddings:
            return self.embed.attend(x * self.config.embed_dim**-0.5)
        return self.head.attend(x)


def num_params(config: T5Config) -> dict[str, int]:
    """How many parameters there are: "total", and "non_embedding", without the tables of tokens."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(T5(config).init, jax.random.key(0), ids, ids)["params"]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    tables = 1 if config.tied_embeddings else 2
    return {
        "total": total,
        "non_embedding": total - tables * config.vocab_size * config.embed_dim,
    }
