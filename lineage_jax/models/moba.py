"""MoBA: LLaMA's decoder whose heads each choose the blocks of the past that they read.

Paper:       Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", sections 2
             and 3. https://arxiv.org/abs/2502.13189
Builds on:   llama.py, whose parameters it has, one for one.
What is new: attention as a mixture of experts: of the blocks behind it a query reads those whose
             mean key scores most with it, and the block that it is in up to itself (section 2.2).
             The gate has no parameters, so layers go over to full attention and back as they are;
             the last ones may stay full (sections 2.3 and 3.2).
Departures:  the paper's heads have keys of their own; where query heads share them each still
             chooses for itself. Documents packed in one row do not attend to each other; their
             blocks are those of the row, each of the mean of its last document's keys. A cache
             holds the keys as they are, and the means are taken of them anew.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lineage_jax.kernels import NSAConfig, selected_attention
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.config import reach
from lineage_jax.kernels.native_sparse.reference import select
from lineage_jax.models import llama
from lineage_jax.models.llama import Llama, LlamaConfig, empty_cache, llama3_1_8b, num_params
from lineage_jax.nn import Attention, KVCache, Linear, Mask, stack
from lineage_jax.nn.attention import HEADS, attend, attention_weights
from lineage_jax.nn.fused import ATTENDED, heads_named
from lineage_jax.nn.masks import documents
from lineage_jax.nn.rows_and_heads import by_rows_and_heads, refuse_split_sequences
from lineage_jax.typing import Array, Bool, Float, Int

__all__ = ["Moba", "MobaConfig", "empty_cache", "moba_8b", "num_params"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobaConfig(LlamaConfig):
    """What must be chosen to build one; the defaults are those of the paper's section 3.1."""

    block_size: int = 512
    """Positions in a block: B."""
    top_k: int = 3
    """Blocks that a query reads, its own included: k."""
    full_layers: int = 0
    """So many last layers read everything (section 3.2, layer-wise hybrid)."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("block_size", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.full_layers <= self.num_layers:
            raise ValueError(
                f"full_layers must be in 0 ... num_layers={self.num_layers}, got {self.full_layers}"
            )
        if self.window is not None:
            raise ValueError(f"wanted blocks alone, without a window, got window={self.window}")


def moba_8b() -> MobaConfig:
    """Lu et al. 2025, section 3.3: Llama 3.1 8B, blocks of 4096, 12 of them, three layers full.

    On a context of 2^20 tokens a query reads at most 4.7 % of them.
    """
    sizes = {f.name: getattr(llama3_1_8b(), f.name) for f in dataclasses.fields(LlamaConfig)}
    return MobaConfig(**sizes | dict(max_len=2**20), block_size=4096, top_k=12, full_layers=3)


def chosen_blocks(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S H K"],
    reads: Intervals,
    segment_ids: Int[Array, "B S"] | None,
    config: NSAConfig,
) -> Int[Array, "B T H N"]:
    """The own block of each query, and those behind it whose mean keys score most (equation 6).

    In order; -1 where there are no more. The choice has no gradient.

    Args:
      query, keys: projected heads.
      reads: what each query may read at all.
      segment_ids: which document each key belongs to.
      config: sizes.
    """
    size = config.block_size

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:])

    counted = jnp.ones(blocks(keys).shape[:3])  # B J P
    if segment_ids is not None:
        ids = blocks(segment_ids)
        counted = (ids == ids[:, :, -1:]).astype(jnp.float32)
    shares = counted / counted.sum(-1, keepdims=True)
    query, keys = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (query, keys))
    means = jnp.einsum("bjphk,bjp->bjhk", blocks(keys), shares)
    return select(jnp.einsum("bthk,bjhk->bthj", query, means), config, reads)


def block_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    segment_ids: Int[Array, "B S"] | None,
    offset: int | Int[Array, ""],
    config: NSAConfig,
) -> Float[Array, "B T H E"]:
    """Attention of each query head to the blocks that it chooses.

    Args:
      query, keys, values: projected heads; each of queries has its own blocks, so those of keys
        and values are there once for each.
      segment_ids: which document each key belongs to.
      offset: where the first query stands among the keys.
      config: sizes.
    """
    keys, values = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (keys, values))
    reads = reach(query, segment_ids, offset)
    blocks = chosen_blocks(query, keys, reads, segment_ids, config)
    told: dict[str, Any] = dict(config=config, segment_ids=segment_ids, offset=offset)
    return selected_attention(query, keys, values, blocks, **told)


class BlockAttention(Attention):
    """`Attention` whose heads choose the blocks that they read; the parameters are the same."""

    blocks: NSAConfig = NSAConfig()

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "B T D"],
        mask: Mask,
        positions: Int[Array, "#B T"],
        cache: KVCache | None = None,
        full: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """As `Attention`; where `full`, it reads everything."""
        refuse_split_sequences("a mixture of blocks")
        query, keys, values = (self.heads(name, x) for name in ("query", "key", "value"))
        if self.place is not None:
            query, keys = self.place(query, positions), self.place(keys, positions)
        query, keys, values = (heads_named(x, HEADS) for x in (query, keys, values))
        sparse = functools.partial(self.within_row, documents(mask, x.shape[0]))
        if cache is not None:
            cache = cache.write(positions, keys, values)
            keys, values = cache.keys.astype(self.dtype), cache.values.astype(self.dtype)
            sparse = functools.partial(self.within_cache, positions)

        def everything(query, keys, values):
            return attend(query, keys, values, mask)

        def either(full_form, sparse_form, *heads):
            if full is None:
                return sparse_form(*heads)
            return jax.lax.cond(full, full_form, sparse_form, *heads)

        if self.is_mutable_collection("intermediates"):
            # Where values are columns of the identity, what is read of them are the weights.
            whole = jnp.eye(keys.shape[1])[None, :, None]
            whole = jnp.broadcast_to(whole, (*keys.shape[:3], keys.shape[1]))
            weights = either(
                lambda query, keys, _: attention_weights(query, keys, mask.dense()),
                lambda *heads: sparse(*heads).astype(jnp.float32).swapaxes(1, 2),
                *(query, keys, whole),
            )
            self.sow("intermediates", "weights", weights)
        attended = either(everything, sparse, query, keys, values)
        attended = checkpoint_name(attended, ATTENDED)
        inputs, axes = (self.num_heads, self.head_dim), ("heads", "head", "embed")
        out = Linear(inputs, x.shape[-1:], axes, self.out_stddev, name="out", **self.types)
        return out(attended), cache

    @nn.nowrap
    def within_row(self, segment_ids: Array | None, *heads: Array) -> Float[Array, "B T H E"]:
        """Attention to blocks of the row that the queries are."""

        def read(heads, segment_ids):
            return block_attention(*heads, segment_ids, 0, self.blocks)

        return by_rows_and_heads(read, heads, segment_ids)

    @nn.nowrap
    def within_cache(self, positions: Array, *heads: Array) -> Float[Array, "B T H E"]:
        """Attention to blocks of a cache, each row's queries at its own positions."""

        def row(offset, *heads):
            heads = (x[None] for x in heads)
            return block_attention(*heads, None, offset, self.blocks)[0]

        return jax.vmap(row)(positions[:, 0], *heads)


class Block(llama.Block):
    """LLaMA's block with another attention, for layers that choose and for those that do not."""

    config: MobaConfig

    @nn.nowrap
    def attend(  # type: ignore[override]
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        mask: Mask,
        per_layer: tuple[Bool[Array, ""] | None, KVCache | None],
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """What the layer attends to, and the cache with x in it."""
        full, cache = per_layer
        fields = dict(self.attention_fields, use_bias=False, blocks=selection(self.config))
        return BlockAttention(**fields, name="attention")(x, mask, positions, cache, full)


class Moba(Llama):
    """Scores every next token of a batch of sequences, as `Llama` does.

    Padding (`mask`) may stand at the ends of documents. With a cache the positions of a row are one
    after another.
    """

    config: MobaConfig

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
        return blocks(c, name="blocks")(x, (positions, reads), (full_layers(c), cache))


def full_layers(config: MobaConfig) -> Bool[Array, "L"] | None:
    """Which layers read everything; None if no layer does."""
    if config.full_layers == 0:
        return None
    return jnp.arange(config.num_layers) >= config.num_layers - config.full_layers


def selection(config: MobaConfig) -> NSAConfig:
    """The sizes as the kernel of selected blocks has them, which nothing is compressed for."""
    size = config.block_size
    return NSAConfig(
        compressed_size=size,
        stride=size,
        block_size=size,
        num_blocks=config.top_k,
        num_first=0,
        num_local=1,
        window=1,
    )
