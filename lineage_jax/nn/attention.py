"""Attention: a weighted average of values, the weights from queries and keys."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lineage_jax.kernels.platform import platform
from lineage_jax.nn.fused import ATTENDED, fused_attention, heads_named
from lineage_jax.nn.linear import Linear
from lineage_jax.nn.masks import Mask
from lineage_jax.nn.norms import without_ones
from lineage_jax.nn.ring import ring_attention
from lineage_jax.nn.split import mesh_axes, split
from lineage_jax.typing import Array, Bool, DTypeLike, Float, Int

HEADS = "heads"
"""What a policy of `jax.checkpoint` calls queries, keys and values, in their places."""

MASKED = -1e30  # finite, so that a row with no visible key gives an average and not NaN


def attention_weights(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    mask: Bool[Array, "#B 1 #T S"] | None = None,
    bias: Float[Array, "#B H T S"] | None = None,
) -> Float[Array, "B H T S"]:
    """softmax(q k / sqrt(K) + bias) (Vaswani et al. 2017, equation 1), in float32.

    Query heads share key-value heads in groups of H / G (Ainslie et al. 2023): query head h reads
    key-value head h // (H / G).

    Args:
      query, keys: projected heads.
      mask: True where a query may read a key.
      bias: added to the scores, such as what a distance is worth to a head.
    """
    (batch, length, num_heads, head_dim), num_groups = query.shape, keys.shape[2]
    # The heads of a group lie one under the other in its matrix of queries. (As an axis of its
    # own, of extent 1 without groups, H / G more than doubles the time on CPU.)
    stacked = query.swapaxes(1, 2).reshape(batch, num_groups, -1, head_dim)  # B G (H/G T) K
    scores = jnp.einsum("bgtk,bsgk->bgts", stacked, keys)
    scores = scores.reshape(batch, num_heads, length, -1)  # B H T S
    scores = scores.astype(jnp.float32) / math.sqrt(head_dim)
    if bias is not None:
        scores += bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    return jax.nn.softmax(without_ones(scores), axis=-1).reshape(scores.shape)


def dot_product_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    mask: Bool[Array, "#B 1 #T S"] | None = None,
    dropout: nn.Module | None = None,
    bias: Float[Array, "#B H T S"] | None = None,
) -> Float[Array, "B T H K"]:
    """Values averaged by `attention_weights`; query head h reads key-value head h // (H / G).

    Args:
      query, keys, values: projected heads.
      mask: True where a query may read a key.
      dropout: applied to the weights.
      bias: added to the scores.
    """
    (batch, length, num_heads, head_dim), num_groups = query.shape, keys.shape[2]
    weights = attention_weights(query, keys, mask, bias).astype(values.dtype)  # B H T S
    if dropout is not None:
        weights = dropout(weights)
    stacked = weights.reshape(batch, num_groups, -1, weights.shape[-1])  # B G (H/G T) S
    attended = jnp.einsum("bgts,bsgk->bgtk", stacked, values)
    return attended.reshape(batch, num_heads, length, head_dim).swapaxes(1, 2)  # B T H K


def attend(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G K"],
    mask: Mask,
    dropout: nn.Module | None = None,
    bias: Float[Array, "#B H T S"] | None = None,
) -> Float[Array, "B T H K"]:
    """`dot_product_attention`, by a ring where the mesh splits the sequence, by a kernel on TPU.

    With dropout on the weights, a bias of the scores, queries that are not all positions of the
    keys (a cache), or keys that may not be read, the keys and values are gathered instead, and the
    scores are a table.
    """
    length = split("length")
    plain = dropout is None and bias is None and mask.readable is None
    own = plain and query.shape[1] == keys.shape[1]
    if length is not None and own and query.shape[1] % length[1] == 0:
        return ring_attention(query, keys, values, mask, length[0])
    divides = query.shape[0] % math.prod(mesh_axes("batch").values()) == 0
    known = mask.causal or mask.window is None
    if length is None and own and known and divides and platform() == "tpu":
        return fused_attention(query, keys, values, mask)
    out = dot_product_attention(query, keys, values, mask.dense(), dropout, bias)
    return checkpoint_name(out, ATTENDED)


class KVCache(NamedTuple):
    """Keys and values of the positions read so far; slot s holds position s.

    A query at position p sees slots 0 ... p only, so whatever a slot after p holds is never read:
    right-padded prompts of unequal length need no mask of their own, and each row goes on at its
    own position.
    """

    keys: Float[Array, "*L B S G K"]
    values: Float[Array, "*L B S G K"]

    @property
    def length(self) -> int:
        """Positions that it has room for."""
        return self.keys.shape[-3]

    def write(
        self,
        positions: Int[Array, "B T"],
        keys: Float[Array, "B T G K"],
        values: Float[Array, "B T G K"],
    ) -> "KVCache":
        """The cache with new keys and values at their positions."""
        rows = jnp.arange(positions.shape[0])[:, None]
        return KVCache(
            self.keys.at[rows, positions].set(keys.astype(self.keys.dtype)),
            self.values.at[rows, positions].set(values.astype(self.values.dtype)),
        )


def decoder_mask(
    length: int,
    max_len: int,
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: Any,
    readable: Bool[Array, "B T"] | None = None,
) -> tuple[Int[Array, "#B T"], Mask]:
    """Where the tokens of a decoder are, and what each reads: what is not after it.

    Args:
      length: how many tokens a row has, T.
      max_len: how many it may have.
      positions: of each token in its document; 0 ... T - 1 if not given.
      segment_ids: which document of its row a token belongs to; one document if not given.
      cache: what is kept of earlier positions, which tells its `length`, or None.
      readable: False for padding; all may be read if not given. With a cache padding stands on the
        right alone, where tokens that follow write over it before they read.

    Raises:
      ValueError: for a row that is too long; for a cache without positions, or with segment ids.
    """
    if length > max_len:
        raise ValueError(f"at most max_len={max_len} tokens a sequence, got {length}")
    if cache is not None and (positions is None or segment_ids is not None):
        raise ValueError("a cache needs the positions to write to, and holds one document a row")
    index = jnp.arange(length)[None]  # 1 T
    if positions is None:
        positions = index
    if cache is None:
        return positions, Mask(index, index, segment_ids, segment_ids, readable=readable)
    return positions, Mask(positions, jnp.arange(cache.length)[None])  # B T, 1 S


class Attention(nn.Module):
    """Multi-head self-attention with a cache passed in and returned.

    Asked for intermediates, it gives its "weights" too, [B, H, T, S].

    `place`, if given, tells queries and keys where they are: from heads [B, T, heads, K] and their
    positions [#B, T] to heads of the same shape (`rotate`). The cache holds keys so placed.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    stddev: float
    out_stddev: float
    use_bias: bool = True
    dropout_rate: float = 0.0
    place: Callable[[Array, Array], Array] | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Mask,
        positions: Int[Array, "#B T"],
        cache: KVCache | None = None,
        train: bool = False,
        bias: Float[Array, "#B H T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends within x, or within the cache after x has been written to it.

        Args:
          x: the residual stream, normed.
          mask: which keys each query reads.
          positions: of each token, for `place` and the cache.
          cache: keys and values of earlier positions.
          train: whether dropout acts.
          bias: added to the scores.

        Returns:
          The attended values, projected to the width of x, and the cache with x in it.
        """
        query = self.heads("query", x)  # B T H K
        keys, values = self.heads("key", x), self.heads("value", x)  # B T G K
        if self.place is not None:
            query, keys = self.place(query, positions), self.place(keys, positions)
        query, keys, values = (heads_named(x, HEADS) for x in (query, keys, values))
        if cache is not None:
            cache = cache.write(positions, keys, values)
            keys, values = cache.keys.astype(self.dtype), cache.values.astype(self.dtype)
        return self.attended(query, keys, values, mask, train, x.shape[-1], bias), cache

    @nn.nowrap
    def heads(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T heads K"]:
        """Projects to the heads of queries, or of keys and values."""
        own = name == "query"
        num_heads, axis = (self.num_heads, "heads") if own else (self.num_kv_heads, "kv_heads")
        outputs, axes = (num_heads, self.head_dim), ("embed", axis, "head")
        return Linear((x.shape[-1],), outputs, axes, self.stddev, name=name, **self.types)(x)

    @nn.nowrap
    def attended(
        self,
        query: Float[Array, "B T H K"],
        keys: Float[Array, "B S G K"],
        values: Float[Array, "B S G K"],
        mask: Mask,
        train: bool,
        width: int,
        bias: Float[Array, "#B H T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The values read, projected back to the width of the residual stream."""
        if self.is_mutable_collection("intermediates"):
            weights = attention_weights(query, keys, mask.dense(), bias)
            self.sow("intermediates", "weights", weights)
        dropout = None
        if train and self.dropout_rate:
            dropout = nn.Dropout(self.dropout_rate, deterministic=False)
        attended = attend(query, keys, values, mask, dropout, bias)  # B T H K
        inputs, axes = (self.num_heads, self.head_dim), ("heads", "head", "embed")
        return Linear(inputs, (width,), axes, self.out_stddev, name="out", **self.types)(attended)

    @property
    def types(self) -> dict[str, Any]:
        """What the linear maps have in common."""
        return dict(use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)


class CrossAttention(Attention):
    """Multi-head attention from a target to a source, whose keys and values can be kept.

    The fields are those of `Attention`; heads are not placed.
    """

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S M"] | None,
        mask: Mask,
        memory: KVCache | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attends from x to the source, or to the keys and values of one that was seen before.

        Args:
          x: the residual stream, normed.
          source: what the encoder made of the source; None to read `memory` instead.
          mask: which keys each query reads.
          memory: the source's keys and values.
          train: whether dropout acts.

        Returns:
          The attended values, projected to the width of x, and the source's keys and values.
        """
        query = self.heads("query", x)
        if source is not None:
            memory = KVCache(self.heads("key", source), self.heads("value", source))
        assert memory is not None, "neither a source nor its keys and values"
        keys, values = memory.keys.astype(self.dtype), memory.values.astype(self.dtype)
        return self.attended(query, keys, values, mask, train, x.shape[-1]), memory
