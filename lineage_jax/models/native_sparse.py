"""Native Sparse Attention: LLaMA's decoder that reads a part of what is behind, and learns which.

Paper:       Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable
             Sparse Attention", sections 3 and 4.1. https://arxiv.org/abs/2502.11089
Builds on:   llama.py, with grouped queries.
What is new: attention in three branches, weighed by learned gates (equation 5): to blocks squeezed
             into one key and value each (equation 7), to the few blocks that get most of that
             attention, as they are (equations 8 to 12), and to the last positions (section 3.3.3).
             The query heads of a group choose together. Each branch has keys and values of its own.
             The layer is `lineage_jax.nn.NativeSparseAttention`, which gpt.py and transformer.py
             take by its name, too; `lineage_jax.kernels` computes it.
Departures:  no mixture of experts: the feed-forward layer is LLaMA's. The paper does not say where
             rotations go: queries turn by their positions, keys that are selected or near by
             theirs, and a compressed key, after it was made, by that of its block's first token,
             so that all scores depend on distances alone. It does not print the MLP of equation
             7, which here has one hidden layer, nor that of the gates, here one linear map; nor how
             weights start. Documents packed in one row do not attend to each other; their blocks
             are those of the row.
"""

import dataclasses

from flax import linen as nn

from lineage_jax.kernels import NSACache, NSAConfig
from lineage_jax.models import llama
from lineage_jax.models.llama import Llama, LlamaConfig, head_dim
from lineage_jax.nn import Mask, NativeSparseAttention, nsa_caches, stack
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
    rooms = c.num_layers, batch_size, length, c.num_kv_heads
    return nsa_caches(*rooms, *widths, c.dtype, c.sparse)


def num_params(config: NativeSparseConfig) -> dict[str, int]:
    """How many parameters there are: "total", and "non_embedding" as Kaplan et al. 2020 count."""
    return llama.num_params(config, NativeSparse)
