"""Native Sparse Attention: LLaMA's decoder that reads a part of what is behind, and learns which.

Paper:       Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable
             Sparse Attention", sections 3 and 4.1. https://arxiv.org/abs/2502.11089
Builds on:   llama.py, with grouped queries.
What is new: attention in three branches, weighed by learned gates (equation 5): to blocks squeezed
             into one key and value each (equation 7), to the few blocks that get most of that
             attention, as they are (equations 8 to 12), and to the last positions (section 3.3.3).
             The query heads of a group choose together. Each branch has keys and values of its own.
             `lineage_jax.kernels` computes it.
Departures:  no mixture of experts: the feed-forward layer is LLaMA's. The paper does not say where
             rotations go: queries turn by their positions, keys that are selected or near by
             theirs, and a compressed key, after it was made, by that of its block's first token,
             so that all scores depend on distances alone. It does not print the MLP of equation
             7, which here has one hidden layer, nor that of the gates, here one linear map; nor how
             weights start. Documents packed in one row do not attend to each other; their blocks
             are those of the row.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lineage_jax.kernels import (
    PAPER,
    Branches,
    NSACache,
    NSAConfig,
    Squeeze,
    compress,
    empty_nsa_cache,
    native_sparse_attention,
    nsa_decode,
)
from lineage_jax.models import llama
from lineage_jax.models.llama import Llama, LlamaConfig, head_dim
from lineage_jax.nn import Linear, Mask, stack
from lineage_jax.nn.attention import HEADS
from lineage_jax.nn.fused import ATTENDED, heads_named
from lineage_jax.nn.linear import project
from lineage_jax.nn.masks import documents
from lineage_jax.nn.rows_and_heads import by_rows_and_heads, refuse_split_sequences
from lineage_jax.typing import Array, Bool, DTypeLike, Float, Int


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


class Compression(nn.Module):
    """The map from a block's keys, or values, to one, phi of equation 7: an MLP over all of them.

    W2 silu(W1 (x + p)), x the block's P heads in a row and p learned positions in the block. All
    heads share it. Weights start so that what comes out is about as large as what goes in.

    Attributes:
      size: positions in a block, P.
      width: of a head.
      hidden_dim: width between the two maps.
      stddev: of the initial positions.
    """

    size: int
    width: int
    hidden_dim: int
    stddev: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self) -> Squeeze:
        """The map as a function of arrays alone, for kernels call it where no module may be."""

        def weights(name: str, stddev: float, axes: tuple[str, ...], *shape: int) -> Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(stddev), axes)
            value: Any = self.param(name, init, shape, self.param_dtype)
            return value.astype(self.dtype)

        # Its heads are split where those of keys are, so its hidden layer is whole; what is split
        # of its weights is only stored so, like the residual stream's width.
        size, width, hidden = self.size, self.width, self.hidden_dim
        places = weights("positions", self.stddev, ("position", "head"), size, width)
        into, back = ("position", "head", "embed"), ("embed", "head")
        up = weights("up", 1 / math.sqrt(size * width), into, size, width, hidden)
        down = weights("down", 1 / math.sqrt(hidden), back, hidden, width)

        def squeeze(pieces: Float[Array, "*blocks P K"]) -> Float[Array, "*blocks K"]:
            blocks = pieces.shape[:-2]
            pieces = pieces.astype(self.dtype) + places.reshape((1,) * len(blocks) + places.shape)
            inner = project(pieces.reshape(*blocks, size * width), up.reshape(-1, hidden))
            return project(jax.nn.silu(inner), down)

        return squeeze


class NativeSparseAttention(nn.Module):
    """Native Sparse Attention (Yuan et al. 2025, section 3), in the place of `Attention`.

    Three branches have keys and values of their own (section 3.3.3); a gate of each query head,
    made of the input, weighs each of them (equation 5).

    `place` is that of `Attention`. A compressed key is placed where its block begins. Blocks begin
    at multiples of their sizes in a row, wherever a packed document does.

    Asked for intermediates, it gives its "weights" too, [B, H, T, S]: those of the branches by the
    share that each has of the gates, a compressed key's spread evenly over its positions.

    Attributes:
      num_heads, num_kv_heads: of queries; of keys and values in each branch.
      head_dim, value_dim: widths of a head of queries and keys, and of one of values.
      hidden_dim: width of the hidden layer of what squeezes a block (`Compression`).
      stddev, out_stddev: of the initial weights.
      sparse: what is read.
      place: tells queries and keys where they are.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    hidden_dim: int
    stddev: float
    out_stddev: float
    sparse: NSAConfig = PAPER
    place: Callable[[Array, Array], Array] | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask,
        positions: Int[Array, "#B T"],
        cache: NSACache | None = None,
    ) -> tuple[Float[Array, "B T D"], NSACache | None]:
        """Attends within x, or within the cache after x has been written to it.

        Args:
          x: the residual stream, normed.
          mask: causal; padding that may not be read stands at the ends of documents. With a cache,
            what is readable is told of x alone, whose padding stands on the right.
          positions: of each token, for `place` and the cache.
          cache: keys and values of earlier positions (`lineage_jax.kernels.empty_nsa_cache`).

        Returns:
          The attended values, projected to the width of x, and the cache with x in it.

        Raises:
          ValueError: for a mask that is not causal, or has a window; on a mesh that splits the
            sequence.
        """
        check(mask)
        query = self.placed(self.heads("query", x, self.num_heads, self.head_dim), positions)
        keys = Branches(*(self.of_branch(name, "key", x) for name in Branches._fields))
        keys = Branches(keys[0], *(self.placed(one, positions) for one in keys[1:]))
        values = Branches(*(self.of_branch(name, "value", x) for name in Branches._fields))
        gates = jax.nn.sigmoid(self.gate_scores(x).astype(jnp.float32))  # B T H 3
        squeeze = (
            self.compression("compress_keys", self.head_dim),
            self.compression("compress_values", self.value_dim),
        )
        if cache is not None:
            squeeze = (self.placed_where_whole(squeeze[0], positions), squeeze[1])
            told: dict[str, Any] = dict(config=self.sparse, mask=mask.readable)
            new = (query, keys, values, gates)
            attended, cache = nsa_decode(*new, cache, positions, squeeze, **told)
        else:
            squeezed, value = (
                compress(heads[0], learned, self.sparse)
                for heads, learned in zip((keys, values), squeeze, strict=True)
            )
            key = self.placed(squeezed, positions[:, :: self.sparse.stride])
            keys, values = Branches(key, *keys[1:]), Branches(value, *values[1:])
            attended = self.attended(query, keys, values, gates, mask)
        attended = checkpoint_name(attended, ATTENDED)  # B T H E
        inputs, axes = (self.num_heads, self.value_dim), ("heads", "head", "embed")
        outputs, types = (x.shape[-1],), dict(use_bias=False, **self.types)
        out = Linear(inputs, outputs, axes, self.out_stddev, name="out", **types)
        return out(attended), cache

    @nn.nowrap
    def attended(
        self,
        query: Float[Array, "B T H K"],
        keys: Branches,
        values: Branches,
        gates: Float[Array, "B T H 3"],
        mask: Mask,
    ) -> Float[Array, "B T H E"]:
        """The values that are read within one row."""
        segment_ids = documents(mask, query.shape[0])

        def attend(heads, segment_ids):
            return native_sparse_attention(*heads, config=self.sparse, segment_ids=segment_ids)

        if self.is_mutable_collection("intermediates"):
            # Where values are columns of the identity, what is read of them are the weights.
            batch, length, num_groups, _ = keys.selected.shape
            whole = jnp.eye(length)[None, :, None]
            whole = jnp.broadcast_to(whole, (batch, length, num_groups, length))
            spread = compress(whole, lambda block: block.mean(-2), self.sparse)
            shares = gates / gates.sum(-1, keepdims=True)
            read = query, keys, Branches(spread, whole, whole), shares
            weights = by_rows_and_heads(attend, read, segment_ids)
            self.sow("intermediates", "weights", weights.swapaxes(1, 2))
        return by_rows_and_heads(attend, (query, keys, values, gates), segment_ids)

    @nn.nowrap
    def heads(
        self, name: str, x: Float[Array, "B T D"], count: int, width: int
    ) -> Float[Array, "B T heads K"]:
        """Projects to the heads of queries, or of a branch's keys or values."""
        axes = ("embed", "heads" if name == "query" else "kv_heads", "head")
        inputs, outputs, types = (x.shape[-1],), (count, width), dict(use_bias=False, **self.types)
        linear = Linear(inputs, outputs, axes, self.stddev, name=name, **types)
        return heads_named(linear(x), HEADS)

    @nn.nowrap
    def of_branch(
        self, branch: str, what: str, x: Float[Array, "B T D"]
    ) -> Float[Array, "B T G K"]:
        """Projects to a branch's keys or values."""
        width = self.head_dim if what == "key" else self.value_dim
        return self.heads(f"{branch}_{what}", x, self.num_kv_heads, width)

    @nn.nowrap
    def gate_scores(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H 3"]:
        """What the gates are the sigmoids of."""
        outputs, axes = (self.num_heads, len(Branches._fields)), ("embed", "heads", "gates")
        return Linear((x.shape[-1],), outputs, axes, self.stddev, name="gates", **self.types)(x)

    @nn.nowrap
    def compression(self, name: str, width: int) -> Squeeze:
        """What makes one key or value of a block's."""
        size, hidden = self.sparse.compressed_size, self.hidden_dim
        return Compression(size, width, hidden, self.stddev, name=name, **self.types)()

    @nn.nowrap
    def placed(
        self, heads: Float[Array, "B T heads K"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T heads K"]:
        """Heads that know where they are."""
        return heads if self.place is None else self.place(heads, positions)

    @nn.nowrap
    def placed_where_whole(self, squeeze: Squeeze, positions: Int[Array, "B T"]) -> Squeeze:
        """`squeeze` for the blocks that tokens at `positions` make whole, placed where they begin.

        Of T tokens from position s on, these are ceil(T / stride) blocks from the first that ends
        at s or after it.
        """
        size, stride = self.sparse.compressed_size, self.sparse.stride
        first = -((size - 1 - positions[:, :1]) // stride)  # B 1

        def call(pieces: Float[Array, "B n G P K"]) -> Float[Array, "B n G K"]:
            blocks = first + jnp.arange(pieces.shape[1])[None]
            return self.placed(squeeze(pieces), stride * blocks)

        return call

    @property
    def types(self) -> dict[str, Any]:
        """What the linear maps have in common."""
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)


class Block(llama.Block):
    """LLaMA's block with another attention."""

    config: NativeSparseConfig

    @nn.nowrap
    def attend(  # type: ignore[override]
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        mask: Mask,
        cache: NSACache | None,
    ) -> tuple[Float[Array, "B T D"], NSACache | None]:
        """What the layer attends to, and the cache with x in it."""
        c = self.config
        attention = NativeSparseAttention(
            **self.attention_fields,
            value_dim=value_dim(c),
            hidden_dim=c.compression_dim or head_dim(c),
            sparse=c.sparse,
            name="attention",
        )
        return attention(x, mask, positions, cache)


class NativeSparse(Llama):
    """Scores every next token of a batch of sequences, as `Llama` does.

    Padding (`mask`) may stand at the ends of documents. Right-padded rows need no mask without a
    cache, and with one if they are of unequal length.
    """

    config: NativeSparseConfig

    @nn.nowrap
    def run_blocks(  # type: ignore[override]
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        reads: Mask,
        cache: NSACache | None,
        mask: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], NSACache | None]:
        """The embeddings through all blocks in turn, and the cache with them in it."""
        c = self.config
        reads = dataclasses.replace(reads, readable=mask)  # for what a cache will compress later
        blocks = stack(Block, c.num_layers, remat=c.remat, unroll=c.unroll)
        return blocks(c, name="blocks")(x, (positions, reads), cache)


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
    return llama.num_params(config, NativeSparse)


def check(mask: Mask) -> None:
    """Refuses what the three branches cannot do.

    Raises:
      ValueError: naming it.
    """
    if not mask.causal or mask.window is not None:
        raise ValueError(
            "native sparse attention reads what is before a query, near it by its own window; "
            "wanted a causal mask without a window"
        )
    refuse_split_sequences("native sparse attention")
