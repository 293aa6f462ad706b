"""Native Sparse Attention: LLaMA's decoder that reads a part of what is behind, and learns which.

Paper:       Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable
             Sparse Attention", sections 3 and 4.1. https://arxiv.org/abs/2502.11089
Builds on:   llama.py, with grouped queries.
What is new: attention in three branches, weighed by learned gates (equation 5): to blocks squeezed
             into one key and value each (equation 7), to the few blocks that get most of that
             attention, as they are (equations 8 to 12), and to the last positions (section 3.3.3).
             The query heads of a group choose together. Each branch has keys and values of its own.
             `lineage_jax.nn.native_sparse` is the layer, `lineage_jax.kernels` what computes it.
Departures:  no mixture of experts: the feed-forward layer is LLaMA's. The paper does not say where
             rotations go: queries turn by their positions, keys that are selected or near by
             theirs, and a compressed key, after it was made, by that of its block's first token,
             so that all scores depend on distances alone. It does not print the MLP of equation
             7, which here has one hidden layer, nor that of the gates, here one linear map; nor how
             weights start. Documents packed in one row do not attend to each other; their blocks
             are those of the row.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.kernels import NSACache, NSAConfig, empty_nsa_cache
from lineage_jax.models.llama import LlamaConfig, head_dim
from lineage_jax.nn import (
    Embed,
    GatedMLP,
    KVCache,
    Mask,
    RMSNorm,
    decoder_mask,
    rotate,
    stack,
)
from lineage_jax.nn.native_sparse import NativeSparseAttention
from lineage_jax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeSparseConfig(LlamaConfig):
    """What must be chosen to build one."""

    sparse: NSAConfig = dataclasses.field(default_factory=NSAConfig)
    """What is read, in positions; the window of the last ones is in it."""
    value_dim: int | None = None
    """Width of one head of values; that of keys if not given."""
    compression_dim: int | None = None
    """Width between the two maps from a block to one key or value; that of keys if not given."""

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None:
            raise ValueError(
                f"wanted the window in sparse.window, and no other, got window={self.window}"
            )
        for name in ("value_dim", "compression_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def nsa_dense() -> NativeSparseConfig:
    """Yuan et al. 2025, section 4.1, without its experts: 5.1 B parameters.

    30 layers of width 2560; 64 heads of queries in 4 groups, 192 wide, and their values 128; rows
    of 8192 tokens; it reads what `NSAConfig` does by default. A token meets 8 experts there, 2 that
    all share and 6 of 72: one layer as wide as these is in their place. The paper prints neither
    their width nor the vocabulary, which are DeepSeekMoE 16B's as released; all 74 experts would
    make it 26.5 B parameters, and the paper's has 27 B.
    """
    return NativeSparseConfig(
        num_layers=30,
        embed_dim=2560,
        num_heads=64,
        num_kv_heads=4,
        head_dim=192,
        value_dim=128,
        mlp_dim=8 * 1408,
        vocab_size=102_400,
        max_len=8192,
        dtype="bfloat16",
        remat="full",
    )


class Block(nn.Module):
    """Attention, then a gated feed-forward layer, each added to the residual stream."""

    config: NativeSparseConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: tuple[Int[Array, "#B T"], Mask],
        per_layer: NSACache | None,
    ) -> tuple[Float[Array, "B T D"], NSACache | None]:
        c = self.config
        (positions, mask), cache = shared, per_layer
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        out_std = c.init_std / math.sqrt(2 * c.num_layers)
        norm = functools.partial(RMSNorm, c.norm_epsilon, **types)
        attention = NativeSparseAttention(
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=head_dim(c),
            value_dim=value_dim(c),
            hidden_dim=c.compression_dim or head_dim(c),
            stddev=c.init_std,
            out_stddev=out_std,
            sparse=c.sparse,
            place=functools.partial(rotate, base=c.rope_base, scaling=c.rope_scaling),
            name="attention",
            **types,
        )
        mlp = GatedMLP(c.mlp_dim, nn.silu, c.init_std, out_std, name="mlp", **types)
        attention_norm, mlp_norm = norm(name="attention_norm"), norm(name="mlp_norm")
        attended, cache = attention(attention_norm(x), mask, positions, cache)
        x = x + attended
        x = x + mlp(mlp_norm(x))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation")), cache


class NativeSparse(nn.Module):
    """Scores every next token of a batch of sequences."""

    config: NativeSparseConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: NSACache | None = None,
        train: bool = False,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], NSACache | None]:
        """Maps token ids in [0, V) to float32 logits; position t scores token t + 1.

        Args:
          tokens: ids in [0, vocab_size).
          positions: of each token in its document, in [0, max_len); 0 ... T - 1 if not given.
          segment_ids: which document of its row a token belongs to; one document if not given
            (always so with a cache).
          cache: keys and values of earlier positions (`empty_cache`); the tokens are written to
            it at `positions`, which must then be given.
          train: as for GPT; it changes nothing where there is no dropout.
          mask: False for padding, which nothing reads, at the ends of a document. Right-padded rows
            need none without a cache, and with one if they are of unequal length.

        Returns:
          The logits, and the cache with these tokens in it (None if none was given). Asked for
          intermediates, it gives "hidden" too, [B, T, D]: what the logits are made of.
        """
        c = self.config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        length = tokens.shape[1]
        held = None if cache is None else KVCache(cache.keys.selected, cache.values.selected)
        positions, reads = decoder_mask(length, c.max_len, positions, segment_ids, held, mask)
        reads = dataclasses.replace(reads, readable=mask)  # for what a cache will compress later
        embed = Embed(c.vocab_size, c.embed_dim, "vocab", c.init_std, name="embed", **types)
        x = nn.with_logical_constraint(embed(tokens), ("batch", "length", "embed_activation"))

        blocks = stack(Block, c.num_layers, remat=c.remat, unroll=c.unroll)
        x, cache = blocks(c, name="blocks")(x, (positions, reads), cache)
        x = RMSNorm(c.norm_epsilon, name="final_norm", **types)(x)
        self.sow("intermediates", "hidden", x)
        head = embed
        if not c.tied_embeddings:
            head = Embed(c.vocab_size, c.embed_dim, "vocab", c.init_std, name="head", **types)
        return head.attend(x), cache  # B T V


def value_dim(config: NativeSparseConfig) -> int:
    """Width of one head of values."""
    return config.value_dim or head_dim(config)


def empty_cache(config: NativeSparseConfig, batch_size: int, length: int) -> NSACache:
    """Room for `length` positions of `batch_size` sequences in every layer."""
    c = config
    widths = head_dim(c), value_dim(c)
    one = empty_nsa_cache(batch_size, length, c.num_kv_heads, *widths, c.dtype, c.sparse)
    return jax.tree.map(lambda leaf: jnp.zeros((c.num_layers, *leaf.shape), leaf.dtype), one)


def num_params(config: NativeSparseConfig) -> dict[str, int]:
    """How many parameters there are: "total", and "non_embedding" as Kaplan et al. 2020 count."""
    shapes = jax.eval_shape(
        NativeSparse(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    )["params"]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    tables = (1 if config.tied_embeddings else 2) * config.vocab_size * config.embed_dim
    return {"total": total, "non_embedding": total - tables}
