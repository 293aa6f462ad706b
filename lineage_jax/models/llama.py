"""LLaMA: GPT's decoder with cheaper norms, gated layers, rotated heads, and more to read.

Paper:       Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models", section
             2.2 and table 2; Touvron et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat
             Models", section 2.2 and table 1 (arXiv 2307.09288); Jiang et al. 2023, "Mistral 7B",
             section 2 and table 1 (arXiv 2310.06825); Grattafiori et al. 2024, "The Llama 3 Herd of
             Models", section 3.2 and table 3 (arXiv 2407.21783).
             https://arxiv.org/abs/2302.13971
Builds on:   gpt.py, with the norms before each sublayer.
What is new: RMSNorm for LayerNorm (Zhang and Sennrich 2019), SwiGLU for GELU (Shazeer 2020),
             rotations for learned positions (Su et al. 2021); no bias, no dropout, a head of its
             own; Llama 2 lets several heads of queries share one of keys and values; Mistral reads
             a window of the last tokens; Llama 3 turns more slowly, and Llama 3.1 slows the slowest
             pairs further, for longer contexts.
Departures:  documents packed in one row do not attend to each other (segment ids). The papers do
             not print how weights start: normal, residual projections by 1 / sqrt(2 L), as gpt.py.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.nn import (
    Attention,
    Embed,
    GatedMLP,
    KVCache,
    Mask,
    Remat,
    RMSNorm,
    RopeScaling,
    decoder_mask,
    rotate,
    stack,
)
from lineage_jax.typing import Array, Bool, Float, Int, Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What must be chosen to build one LLaMA."""

    num_layers: int
    embed_dim: int
    """Width of the residual stream."""
    num_heads: int
    num_kv_heads: int
    """Heads of keys and values; each is read by num_heads / num_kv_heads heads of queries."""
    mlp_dim: int
    """Width of the gated feed-forward layer."""
    vocab_size: int
    max_len: int
    """Longest sequence, in tokens."""
    head_dim: int | None = None
    """Width of one head; embed_dim / num_heads if not given."""
    rope_base: float = 10_000.0
    """Pair i of a head turns by position / rope_base^(2i / head_dim) (Su et al., section 3.2.2)."""
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    """Slower rotations for contexts longer than those trained on; as they are by default."""
    window: int | None = None
    """If given, each layer reads only this many last tokens (Mistral 7B, section 2)."""
    tied_embeddings: bool = False
    """Whether the table of tokens also scores them, as in GPT; LLaMA as released has two."""
    init_std: float = 0.02
    """Standard deviation of the initial weights: GPT's."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in each norm; of Llama 2 as released."""
    dtype: Precision = "float32"
    """Of activations; logits and statistics are float32."""
    param_dtype: Precision = "float32"
    remat: Remat = "none"
    """What the backward pass recomputes of a block (`lineage_jax.nn.stack`)."""
    unroll: int = 1
    """Layers in one iteration of the scan over depth."""

    def __post_init__(self):
        sizes = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim")
        for name in (*sizes, "vocab_size", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}, "
                "or head_dim be given"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if head_dim(self) % 2:
            raise ValueError(f"head_dim must be even, as pairs turn, got {head_dim(self)}")


def llama_7b() -> LlamaConfig:
    """Touvron et al. 2023, table 2, first row: 6.7 B parameters."""
    return llama(num_layers=32, embed_dim=4096, num_heads=32)


def llama_13b() -> LlamaConfig:
    """Touvron et al. 2023, table 2, second row: 13.0 B parameters."""
    return llama(num_layers=40, embed_dim=5120, num_heads=40)


def llama_33b() -> LlamaConfig:
    """Touvron et al. 2023, table 2, third row: 32.5 B parameters."""
    return llama(num_layers=60, embed_dim=6656, num_heads=52)


def llama_65b() -> LlamaConfig:
    """Touvron et al. 2023, table 2, last row: 65.2 B parameters; released with another epsilon."""
    return llama(num_layers=80, embed_dim=8192, num_heads=64, norm_epsilon=1e-5)


def llama(
    *, num_layers: int, embed_dim: int, num_heads: int, norm_epsilon: float = 1e-6
) -> LlamaConfig:
    """Any row of table 2.

    The feed-forward width is 2/3 of 4 embed_dim (section 2.2), up to the next multiple of 256. That
    multiple, the vocabulary, the context and epsilon are those of the released models.
    """
    return LlamaConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        mlp_dim=256 * math.ceil(8 * embed_dim / 3 / 256),
        vocab_size=32_000,
        max_len=2048,
        norm_epsilon=norm_epsilon,
        dtype="bfloat16",
        remat="full",
    )


def llama2_70b() -> LlamaConfig:
    """Llama 2's largest: 8 heads of keys and values, a context of 4096 (its section 2.2, table 1).

    LLaMA 65B's other sizes, with the wider feed-forward layer of the released model: what the
    narrower keys and values save (its appendix A.2.1).
    """
    return dataclasses.replace(llama_65b(), num_kv_heads=8, mlp_dim=28_672, max_len=4096)


def mistral_7b() -> LlamaConfig:
    """Jiang et al. 2023, table 1: 7.2 B parameters, each layer reading the last 4096 tokens.

    The table's context of 8192 is what the model was trained on; epsilon as released.
    """
    return dataclasses.replace(
        llama_7b(), num_kv_heads=8, mlp_dim=14_336, max_len=8192, window=4096, norm_epsilon=1e-5
    )


def llama3_8b() -> LlamaConfig:
    """Grattafiori et al. 2024, table 3: 8.0 B parameters, 128,256 tokens, a base of 500,000.

    The context is that of the first stages of its training (section 3.4.1) and of Llama 3 as
    released.
    """
    return dataclasses.replace(
        llama_7b(),
        num_kv_heads=8,
        mlp_dim=14_336,
        vocab_size=128_256,
        max_len=8192,
        rope_base=500_000.0,
        norm_epsilon=1e-5,
    )


def llama3_1_8b() -> LlamaConfig:
    """Llama 3.1 8B as released: Llama 3 with slow pairs slowed by 8, a context of 131,072."""
    scaling = RopeScaling(factor=8.0, trained_len=8192)
    return dataclasses.replace(llama3_8b(), max_len=131_072, rope_scaling=scaling)


class Block(nn.Module):
    """Attention, then a gated feed-forward layer, each added to the residual stream."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: tuple[Int[Array, "#B T"], Mask],
        per_layer: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config
        norm = functools.partial(RMSNorm, c.norm_epsilon, **self.types)
        mlp = GatedMLP(c.mlp_dim, nn.silu, c.init_std, self.out_std, name="mlp", **self.types)
        attention_norm, mlp_norm = norm(name="attention_norm"), norm(name="mlp_norm")
        attended, cache = self.attend(attention_norm(x), *shared, per_layer)
        x = x + attended
        x = x + mlp(mlp_norm(x))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation")), cache

    @nn.nowrap
    def attend(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        mask: Mask,
        cache: KVCache | None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """What the layer attends to, and the cache with x in it."""
        attention = Attention(**self.attention_fields, use_bias=False, name="attention")
        mask = dataclasses.replace(mask, window=self.config.window)
        return attention(x, mask, positions, cache)

    @property
    def attention_fields(self) -> dict[str, Any]:
        """Of any attention that takes the place of this one."""
        c = self.config
        return dict(
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=head_dim(c),
            stddev=c.init_std,
            out_stddev=self.out_std,
            place=functools.partial(rotate, base=c.rope_base, scaling=c.rope_scaling),
            **self.types,
        )

    @property
    def out_std(self) -> float:
        """Standard deviation of the initial weights back to the residual stream."""
        return self.config.init_std / math.sqrt(2 * self.config.num_layers)

    @property
    def types(self) -> dict[str, Any]:
        """Of activations and parameters."""
        return dict(dtype=self.config.dtype, param_dtype=self.config.param_dtype)


class Llama(nn.Module):
    """Scores every next token of a batch of sequences.

    A child changes what its blocks attend to (`run_blocks`), and may keep another cache.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
        train: bool = False,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Maps token ids in [0, V) to float32 logits; position t scores token t + 1.

        Args:
          tokens: ids in [0, vocab_size).
          positions: of each token in its document, in [0, max_len); 0 ... T - 1 if not given.
          segment_ids: which document of its row a token belongs to; one document if not given
            (always so with a cache).
          cache: keys and values of earlier positions (`empty_cache`); the tokens are written to
            it at `positions`, which must then be given.
          train: as for GPT; it changes nothing where there is no dropout.
          mask: False for padding, which nothing reads; right-padded rows need none.

        Returns:
          The logits, and the cache with these tokens in it (None if none was given). Asked for
          intermediates, it gives "hidden" too, [B, T, D]: what the logits are made of.
        """
        c = self.config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        length = tokens.shape[1]
        positions, reads = decoder_mask(length, c.max_len, positions, segment_ids, cache, mask)
        embed = Embed(c.vocab_size, c.embed_dim, "vocab", c.init_std, name="embed", **types)
        x = nn.with_logical_constraint(embed(tokens), ("batch", "length", "embed_activation"))

        x, cache = self.run_blocks(x, positions, reads, cache, mask)
        x = RMSNorm(c.norm_epsilon, name="final_norm", **types)(x)
        self.sow("intermediates", "hidden", x)
        head = embed
        if not c.tied_embeddings:
            head = Embed(c.vocab_size, c.embed_dim, "vocab", c.init_std, name="head", **types)
        return head.attend(x), cache  # B T V

    @nn.nowrap
    def run_blocks(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        reads: Mask,
        cache: KVCache | None,
        mask: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The embeddings through all blocks in turn, and the cache with them in it."""
        c = self.config
        blocks = stack(Block, c.num_layers, remat=c.remat, unroll=c.unroll)
        return blocks(c, name="blocks")(x, (positions, reads), cache)


def head_dim(config: LlamaConfig) -> int:
    """Width of one head."""
    return config.head_dim or config.embed_dim // config.num_heads


def empty_cache(config: LlamaConfig, batch_size: int, length: int) -> KVCache:
    """Room for `length` positions of `batch_size` sequences in every layer."""
    shape = (config.num_layers, batch_size, length, config.num_kv_heads, head_dim(config))
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def num_params(config: LlamaConfig, module: type[nn.Module] = Llama) -> dict[str, int]:
    """How many parameters there are: "total", and "non_embedding" as Kaplan et al. 2020 count.

    The latter (their section 2.1) leaves out the table of tokens, and the head's if it has one.

    Args:
      config: of the model.
      module: the model, of which a child may be asked.
    """
    shapes = jax.eval_shape(
        module(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    )["params"]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    tables = (1 if config.tied_embeddings else 2) * config.vocab_size * config.embed_dim
    return {"total": total, "non_embedding": total - tables}
