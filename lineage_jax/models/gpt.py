"""GPT: a Transformer decoder trained to predict the next token, and nothing else.

Paper:       Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training",
             section 4.1 (GPT-1); Radford et al. 2019, "Language Models are Unsupervised Multitask
             Learners", section 2.3 and table 2 (GPT-2); Brown et al. 2020, "Language Models are
             Few-Shot Learners", section 2.1 and table 2.1 (GPT-3).
             https://arxiv.org/abs/2005.14165
Builds on:   the Transformer decoder without its encoder (Vaswani et al. 2017; Liu et al. 2018).
What is new: one stack, pre-trained on text alone, and one linear layer on its last state to learn
             a task; GPT-2 moves the norms before each sublayer, adds one after the last, and
             shrinks the residual projections by 1 / sqrt(2 L) at the start; GPT-3 alternates dense
             with locally banded attention.
Departures:  documents packed in one row do not attend to each other (segment ids). Layers may have
             Native Sparse Attention (Yuan et al. 2025, native_sparse.py) in the place of theirs.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.kernels import NSAConfig
from lineage_jax.nn import (
    MLP,
    Attention,
    AttentionName,
    DecoderCache,
    Embed,
    KVCache,
    LayerNorm,
    Linear,
    Mask,
    NativeSparseAttention,
    Remat,
    check_attention,
    decoder_mask,
    nsa_caches,
    stack,
)
from lineage_jax.typing import Array, Bool, Float, Int, Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """What must be chosen to build one GPT."""

    num_layers: int
    embed_dim: int
    """Width of the residual stream, d_model."""
    num_heads: int
    vocab_size: int
    max_len: int
    """Longest sequence, in tokens: the rows of the table of positions."""
    head_dim: int | None = None
    """Width of one head; embed_dim / num_heads if not given."""
    mlp_dim: int | None = None
    """Width of the feed-forward layer; 4 embed_dim if not given (GPT-1, section 4.1)."""
    norm_first: bool = True
    """Norms before each sublayer and after the last (GPT-2), or after each sublayer (GPT-1)."""
    local_window: int | None = None
    """If given, every second layer reads only this many last tokens (GPT-3, section 2.1)."""
    attention: AttentionName = "full"
    """What every layer reads its past by. With native_sparse each head chooses for itself, as none
    share keys; groups that do make it fast: those of LLaMA, the milestone native_sparse."""
    sparse: NSAConfig = dataclasses.field(default_factory=NSAConfig)
    """What native_sparse reads, in positions; full attention has no use for it."""
    tied_embeddings: bool = True
    """Whether the table of tokens also scores them (GPT-1, section 3.1), or there is a second."""
    dropout_rate: float = 0.0
    """On embeddings, sublayers and full attention's weights; GPT-1, section 4.1, has 0.1."""
    init_std: float = 0.02
    """Standard deviation of the initial weights (GPT-1, section 4.1)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in each norm, as in the released models."""
    dtype: Precision = "float32"
    """Of activations; logits and statistics are float32."""
    param_dtype: Precision = "float32"
    remat: Remat = "none"
    """What the backward pass recomputes of a block (`lineage_jax.nn.stack`)."""
    unroll: int = 1
    """Layers in one iteration of the scan over depth."""

    def __post_init__(self):
        for name in ("num_layers", "embed_dim", "num_heads", "vocab_size", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}, "
                "or head_dim be given"
            )
        if self.local_window is not None and self.local_window < 1:
            raise ValueError(f"local_window must be at least 1, got {self.local_window}")
        check_attention(self.attention)
        if self.attention == "native_sparse" and self.local_window is not None:
            raise ValueError(
                "wanted local_window=None with native_sparse, whose own is sparse.window, got "
                f"local_window={self.local_window}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(GPTConfig):
    """A GPT that learns to tell labels apart; its vocabulary has the marks around texts, too."""

    num_labels: int = 2
    """Labels that it chooses among."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {self.num_labels}")


def gpt1() -> GPTConfig:
    """Radford et al. 2018, section 4.1: 117 M parameters."""
    return GPTConfig(
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        vocab_size=40_478,
        max_len=512,
        norm_first=False,
        dropout_rate=0.1,
    )


def gpt2_small() -> GPTConfig:
    """Radford et al. 2019, table 2, first row: printed as 117 M, 124 M as released."""
    return gpt2(num_layers=12, embed_dim=768, num_heads=12)


def gpt2_medium() -> GPTConfig:
    """Radford et al. 2019, table 2, second row: printed as 345 M, 355 M as released."""
    return gpt2(num_layers=24, embed_dim=1024, num_heads=16)


def gpt2_large() -> GPTConfig:
    """Radford et al. 2019, table 2, third row: printed as 762 M, 774 M as released."""
    return gpt2(num_layers=36, embed_dim=1280, num_heads=20)


def gpt2_xl() -> GPTConfig:
    """Radford et al. 2019, table 2, last row: printed as 1542 M, 1558 M as released."""
    return gpt2(num_layers=48, embed_dim=1600, num_heads=25)


def gpt2(*, num_layers: int, embed_dim: int, num_heads: int) -> GPTConfig:
    """Any row of GPT-2's table 2, with the vocabulary and context of section 2.3."""
    return GPTConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        vocab_size=50_257,
        max_len=1024,
        dropout_rate=0.1,  # as released
    )


def gpt3_125m() -> GPTConfig:
    """Brown et al. 2020, table 2.1: GPT-3 Small."""
    return gpt3(num_layers=12, embed_dim=768, num_heads=12, head_dim=64)


def gpt3_350m() -> GPTConfig:
    """Brown et al. 2020, table 2.1: GPT-3 Medium."""
    return gpt3(num_layers=24, embed_dim=1024, num_heads=16, head_dim=64)


def gpt3_760m() -> GPTConfig:
    """Brown et al. 2020, table 2.1: GPT-3 Large."""
    return gpt3(num_layers=24, embed_dim=1536, num_heads=16, head_dim=96)


def gpt3_1_3b() -> GPTConfig:
    """Brown et al. 2020, table 2.1: GPT-3 XL, printed with 24 heads of 128.

    Only 16 of them make its width of 2048 and its 1.3 B parameters (24 would make 1.5 B).
    """
    return gpt3(num_layers=24, embed_dim=2048, num_heads=16, head_dim=128)


def gpt3_2_7b() -> GPTConfig:
    """Brown et al. 2020, table 2.1: GPT-3 2.7B."""
    return gpt3(num_layers=32, embed_dim=2560, num_heads=32, head_dim=80)


def gpt3_6_7b() -> GPTConfig:
    """Brown et al. 2020, table 2.1: GPT-3 6.7B."""
    return gpt3(num_layers=32, embed_dim=4096, num_heads=32, head_dim=128)


def gpt3_13b() -> GPTConfig:
    """Brown et al. 2020, table 2.1: GPT-3 13B, printed 5140 wide with 40 heads of 128."""
    return gpt3(num_layers=40, embed_dim=5140, num_heads=40, head_dim=128)


def gpt3_175b() -> GPTConfig:
    """Brown et al. 2020, table 2.1: GPT-3."""
    return gpt3(num_layers=96, embed_dim=12_288, num_heads=96, head_dim=128)


def gpt3(*, num_layers: int, embed_dim: int, num_heads: int, head_dim: int) -> GPTConfig:
    """Any row of GPT-3's table 2.1: context 2048, dense and banded layers in turn.

    The paper does not print the band's width; 256 is GPT-Neo's (Black et al. 2021), which
    reproduces the pattern.
    """
    return GPTConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        vocab_size=50_257,
        max_len=2048,
        local_window=256,
        dtype="bfloat16",
        remat="full",
    )


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to the residual stream."""

    config: GPTConfig
    train: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: tuple[Int[Array, "#B T"], Mask],
        per_layer: tuple[Int[Array, ""], DecoderCache | None],
    ) -> tuple[Float[Array, "B T D"], DecoderCache | None]:
        c = self.config
        norm = functools.partial(LayerNorm, c.norm_epsilon, **self.types)
        drop = nn.Dropout(c.dropout_rate, deterministic=not self.train)
        widths = c.mlp_dim or 4 * c.embed_dim, nn.gelu, c.init_std, self.out_std
        mlp = MLP(*widths, name="mlp", **self.types)
        attention_norm, mlp_norm = norm(name="attention_norm"), norm(name="mlp_norm")
        if c.norm_first:  # GPT-2, section 2.3
            attended, cache = self.attend(attention_norm(x), *shared, *per_layer)
            x = x + drop(attended)
            x = x + drop(mlp(mlp_norm(x)))
        else:
            attended, cache = self.attend(x, *shared, *per_layer)
            x = attention_norm(x + drop(attended))
            x = mlp_norm(x + drop(mlp(x)))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation")), cache

    @nn.nowrap
    def attend(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        mask: Mask,
        window: Int[Array, ""],
        cache: Any,
    ) -> tuple[Float[Array, "B T D"], DecoderCache | None]:
        """What the layer attends to, and the cache with x in it."""
        c = self.config
        fields: dict[str, Any] = dict(
            num_heads=c.num_heads,
            num_kv_heads=c.num_heads,
            head_dim=head_dim(c),
            stddev=c.init_std,
            out_stddev=self.out_std,
            use_bias=True,
            name="attention",
            **self.types,
        )
        if c.attention == "native_sparse":
            fields |= dict(value_dim=head_dim(c), hidden_dim=head_dim(c), sparse=c.sparse)
            return NativeSparseAttention(**fields)(x, mask, positions, cache)
        full = Attention(**fields, dropout_rate=c.dropout_rate)
        return full(x, dataclasses.replace(mask, window=window), positions, cache, self.train)

    @property
    def out_std(self) -> float:
        """Standard deviation of the initial weights back to the residual stream."""
        c = self.config
        return c.init_std / math.sqrt(2 * c.num_layers) if c.norm_first else c.init_std

    @property
    def types(self) -> dict[str, Any]:
        """Of activations and parameters."""
        return dict(dtype=self.config.dtype, param_dtype=self.config.param_dtype)


class GPT(nn.Module):
    """Scores every next token of a batch of sequences."""

    config: GPTConfig

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: DecoderCache | None = None,
        train: bool = False,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], DecoderCache | None]:
        """Maps token ids in [0, V) to float32 logits; position t scores token t + 1.

        Args:
          tokens: ids in [0, vocab_size).
          positions: of each token in its document, in [0, max_len); 0 ... T - 1 if not given.
          segment_ids: which document of its row a token belongs to; one document if not given
            (always so with a cache).
          cache: keys and values of earlier positions (`empty_cache`); the tokens are written to
            it at `positions`, which must then be given.
          train: whether dropout acts; it then needs an rng named "dropout".
          mask: False for padding, which nothing reads; right-padded rows need none. With
            native_sparse it stands at the ends of documents, and a cache must be told of it.

        Returns:
          The logits, and the cache with these tokens in it (None if none was given). Asked for
          intermediates, it gives "hidden" too, [B, T, D]: what the logits are made of.
        """
        x, head, cache = self.states(tokens, positions, segment_ids, cache, train, mask)
        return head.attend(x), cache  # B T V

    @nn.compact
    def states(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: DecoderCache | None = None,
        train: bool = False,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Embed, DecoderCache | None]:
        """What the logits are made of, and by which table; takes what a call takes."""
        c = self.config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        length = tokens.shape[1]
        positions, reads = decoder_mask(length, c.max_len, positions, segment_ids, cache, mask)
        embed = Embed(c.vocab_size, c.embed_dim, "vocab", c.init_std, name="embed", **types)
        place = Embed(c.max_len, c.embed_dim, "position", c.init_std, name="positions", **types)
        x = embed(tokens) + place(positions)  # B T D
        x = nn.Dropout(c.dropout_rate, deterministic=not train)(x)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))

        if c.attention == "native_sparse":
            reads = dataclasses.replace(reads, readable=mask)  # for what a cache compresses later
        blocks = stack(Block, c.num_layers, remat=c.remat, unroll=c.unroll)
        per_layer = (windows(c), cache)
        x, cache = blocks(c, train, name="blocks")(x, (positions, reads), per_layer)
        if c.norm_first:
            x = LayerNorm(c.norm_epsilon, name="final_norm", **types)(x)
        self.sow("intermediates", "hidden", x)
        head = embed
        if not c.tied_embeddings:
            head = Embed(c.vocab_size, c.embed_dim, "vocab", c.init_std, name="head", **types)
        return x, head, cache


class Classifier(nn.Module):
    """Scores the labels of each row, and its next tokens (GPT-1, section 3.2)."""

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B N"], Float[Array, "B T V"]]:
        """Maps rows that begin and end with a mark to float32 logits of labels and of next tokens.

        The labels are scored by W_y h, where h is the state at a row's last token (equation 3).

        Args:
          tokens: ids in [0, vocab_size): start, text, end; or start, premise, delimiter,
            hypothesis, end (section 3.3).
          mask: False for padding; there is none if not given.
          train: whether dropout acts; it then needs an rng named "dropout".
          positions: as of `GPT`.
        """
        last, logits = read(self.config, tokens, mask, train, positions)
        return scores(self.config, self.config.num_labels)(last), logits


class SimilarityClassifier(nn.Module):
    """The same of pairs that have no order, read in both: their last states are added (3.3)."""

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B 2 T"],
        mask: Bool[Array, "B 2 T"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B N"], Float[Array, "B 2 T V"]]:
        last, logits = read_rows(self.config, tokens, mask, train)
        return scores(self.config, self.config.num_labels)(last.sum(1)), logits


class MultipleChoice(nn.Module):
    """Scores each of N answers in a row of its own, for a softmax over them (section 3.3)."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B N T"],
        mask: Bool[Array, "B N T"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N T V"]]:
        last, logits = read_rows(self.config, tokens, mask, train)
        return scores(self.config, 1)(last)[..., 0], logits


def read(
    config: GPTConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None,
    train: bool,
    positions: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B T V"]]:
    """The state at each row's last token, and the logits of next tokens, by a GPT named "gpt".

    The state has dropout of its own before it is scored (section 4.1).
    """
    x, head, _ = GPT(config, name="gpt").states(tokens, positions, train=train, mask=mask)
    index = jnp.arange(tokens.shape[1])
    last = index[-1] if mask is None else jnp.where(mask, index, 0).max(-1)
    state = jnp.take_along_axis(x, jnp.broadcast_to(last, tokens.shape[:1])[:, None, None], axis=1)
    drop = nn.Dropout(config.dropout_rate, deterministic=not train)
    return drop(state[:, 0]), head.attend(x)


def read_rows(
    config: GPTConfig,
    tokens: Int[Array, "B N T"],
    mask: Bool[Array, "B N T"] | None,
    train: bool,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N T V"]]:
    """The same of several rows for each example, which do not read each other."""
    rows, length = tokens.shape[:2], tokens.shape[2]
    flat = None if mask is None else mask.reshape(-1, length)
    last, logits = read(config, tokens.reshape(-1, length), flat, train)
    return last.reshape(*rows, -1), logits.reshape(*rows, length, -1)


def scores(config: GPTConfig, num_labels: int) -> Linear:
    """The new weights of a task, W_y (section 3.2, equation 3): no bias, float32 logits."""
    return Linear(
        (config.embed_dim,),
        (num_labels,),
        ("embed", "vocab"),  # labels are what it knows, as tokens are, and as rarely divide
        config.init_std,
        use_bias=False,
        param_dtype=config.param_dtype,
        name="classifier",
    )


def windows(config: GPTConfig) -> Int[Array, "L"]:
    """How many last tokens each layer reads: all, or in every second layer the local window."""
    layers = jnp.arange(config.num_layers)
    if config.local_window is None:
        return jnp.full_like(layers, config.max_len)
    return jnp.where(layers % 2 == 0, config.max_len, config.local_window)


def head_dim(config: GPTConfig) -> int:
    """Width of one head."""
    return config.head_dim or config.embed_dim // config.num_heads


def empty_cache(config: GPTConfig, batch_size: int, length: int) -> DecoderCache:
    """Room for `length` positions of `batch_size` sequences in every layer."""
    c = config
    shape = (c.num_layers, batch_size, length, c.num_heads, head_dim(c))
    if c.attention == "native_sparse":
        return nsa_caches(*shape, head_dim(c), c.dtype, c.sparse)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def num_params(config: GPTConfig) -> dict[str, int]:
    """How many parameters there are: "total", and "non_embedding" as Kaplan et al. 2020 count.

    The latter (their section 2.1) leaves out the tables of tokens and positions, and the head's.
    """
    shapes = jax.eval_shape(
        GPT(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    )["params"]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    scored = 0 if config.tied_embeddings else config.vocab_size
    tables = (config.vocab_size + scored + config.max_len) * config.embed_dim
    return {"total": total, "non_embedding": total - tables}
