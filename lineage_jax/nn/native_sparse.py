"""Native Sparse Attention as a layer: what a decoder reads its past by in the place of `Attention`.

Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse
Attention", section 3 (arXiv 2502.11089). `lineage_jax.kernels` computes it;
`lineage_jax/models/native_sparse.py` tells the paper, and where this departs from it.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

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
from lineage_jax.nn.attention import HEADS, KVCache
from lineage_jax.nn.fused import ATTENDED, heads_named
from lineage_jax.nn.linear import Linear, project
from lineage_jax.nn.masks import Mask, documents
from lineage_jax.nn.rows_and_heads import by_rows_and_heads, refuse_split_sequences
from lineage_jax.typing import Array, DTypeLike, Float, Int

AttentionName = Literal["full", "native_sparse"]
"""What a decoder reads its past by: all of it, or what `NativeSparseAttention` does."""

DecoderCache = KVCache | NSACache
"""What a decoder keeps of its past, by either."""


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
    at multiples of their sizes in a row, wherever a packed document does. Weights have no dropout,
    which kernels have no place for: a call is not told of training.

    Asked for intermediates, it gives its "weights" too, [B, H, T, S]: those of the branches by the
    share that each has of the gates, a compressed key's spread evenly over its positions.

    Attributes:
      num_heads, num_kv_heads: of queries; of keys and values in each branch.
      head_dim, value_dim: widths of a head of queries and keys, and of one of values.
      hidden_dim: width of the hidden layer of what squeezes a block (`Compression`).
      stddev, out_stddev: of the initial weights.
      use_bias: whether heads and outputs have biases; gates do.
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
    use_bias: bool = False
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
        check_mask(mask)
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
        outputs, types = (x.shape[-1],), dict(use_bias=self.use_bias, **self.types)
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
        types = dict(use_bias=self.use_bias, **self.types)
        linear = Linear((x.shape[-1],), (count, width), axes, self.stddev, name=name, **types)
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


def nsa_caches(
    num_layers: int,
    batch: int,
    length: int,
    num_groups: int,
    key_width: int,
    value_width: int,
    dtype: DTypeLike,
    config: NSAConfig,
) -> NSACache:
    """Room for `length` positions of `batch` sequences in every layer (`empty_nsa_cache`)."""
    one = empty_nsa_cache(batch, length, num_groups, key_width, value_width, dtype, config)
    return jax.tree.map(lambda leaf: jnp.zeros((num_layers, *leaf.shape), leaf.dtype), one)


def check_attention(attention: str) -> None:
    """Refuses an attention that is not there.

    Raises:
      ValueError: naming those there are.
    """
    names = get_args(AttentionName)
    if attention not in names:
        raise ValueError(f"attention must be {' or '.join(names)}, got {attention!r}")


def check_mask(mask: Mask) -> None:
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
