"""How many floating-point operations training takes, counted by closed forms.

A multiplication and an addition are two operations. The backward pass takes twice the forward's.
Every count is a Python int: 6 N D passes the largest int64 long before the largest model.
"""

import dataclasses

from lineage_jax.kernels import Branches, NSAConfig
from lineage_jax.models import gpt as gpt_model
from lineage_jax.models.gpt import GPTConfig
from lineage_jax.models.llama import LlamaConfig, head_dim
from lineage_jax.models.moba import MobaConfig, selection
from lineage_jax.models.native_sparse import NativeSparseConfig, value_dim

FORWARD_AND_BACKWARD = 3


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs per token of a forward pass, by part.

    Attributes:
      blocks: products with the weight matrices of the blocks, 2 per weight.
      attention: scores and weighted sums, over the keys that a query reads on average.
      head: the product with the output table.
    """

    blocks: int
    attention: int
    head: int

    def train(self, *, attention: bool = True, head: bool = True) -> int:
        """FLOPs per token of forward and backward, with the parts that are asked for."""
        parts = self.blocks + attention * self.attention + head * self.head
        return FORWARD_AND_BACKWARD * parts


def gpt(config: GPTConfig, seq_len: int, *, causal: bool = True) -> ForwardFlops:
    """The forward FLOPs per token of a GPT on rows of `seq_len` tokens.

    Kaplan et al. 2020, table 1, with the last layer counted, as Hoffmann et al. 2022, appendix F,
    do. Norms, biases, softmax and look-ups are left out, as in both. Native sparse attention is
    counted as `native_sparse` counts it.

    Args:
      config: the model.
      seq_len: tokens in a row.
      causal: count the half of the scores that the mask leaves, or all of them, as both papers do.
    """
    c, width = config, gpt_model.head_dim(config)
    inner = c.num_heads * width
    mlp_dim = c.mlp_dim or 4 * c.embed_dim
    feed_forward = c.num_layers * 2 * c.embed_dim * mlp_dim
    head = 2 * c.embed_dim * c.vocab_size
    if c.attention == "native_sparse":
        heads = c.num_heads, c.num_heads, width, width, width
        products, attention = _sparse(c.sparse, seq_len, c.num_layers, c.embed_dim, *heads)
        return ForwardFlops(blocks=products + 2 * feed_forward, attention=attention, head=head)
    weights = c.num_layers * 4 * c.embed_dim * inner + feed_forward
    reads = 0
    for layer in range(c.num_layers):
        banded = c.local_window is not None and layer % 2 == 1
        reads += _keys_read(seq_len, c.local_window if banded else None, causal)
    return ForwardFlops(blocks=2 * weights, attention=round(4 * inner * reads / seq_len), head=head)


def llama(config: LlamaConfig, seq_len: int, *, causal: bool = True) -> ForwardFlops:
    """The forward FLOPs per token of a LLaMA, counted as `gpt` counts.

    Keys and values come from the matrices of `num_kv_heads` heads, but every head of queries
    scores all keys that it reads; the feed-forward layer has three matrices.
    """
    c = config
    inner, shared = c.num_heads * head_dim(c), c.num_kv_heads * head_dim(c)
    weights = 2 * c.embed_dim * (inner + shared) + 3 * c.embed_dim * c.mlp_dim
    reads = c.num_layers * _keys_read(seq_len, c.window, causal)
    return ForwardFlops(
        blocks=2 * c.num_layers * weights,
        attention=round(4 * inner * reads / seq_len),
        head=2 * c.embed_dim * c.vocab_size,
    )


def native_sparse(config: NativeSparseConfig, seq_len: int) -> ForwardFlops:
    """The forward FLOPs per token of a Native Sparse Attention, counted as `llama` counts.

    The blocks have three matrices of keys and three of values, those of the gates, and what
    squeezes every stride of positions; attention is what the three branches read (`keys_read`).
    """
    c, widths = config, (head_dim(config), value_dim(config))
    heads = c.num_heads, c.num_kv_heads, *widths, c.compression_dim or head_dim(c)
    products, attention = _sparse(c.sparse, seq_len, c.num_layers, c.embed_dim, *heads)
    return ForwardFlops(
        blocks=products + 2 * c.num_layers * 3 * c.embed_dim * c.mlp_dim,
        attention=attention,
        head=2 * c.embed_dim * c.vocab_size,
    )


def _sparse(
    sparse: NSAConfig,
    seq_len: int,
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    key_width: int,
    value_width: int,
    hidden_dim: int,
) -> tuple[int, int]:
    """Of the attention of all layers: products with weights, and what the branches read."""
    keys, values = num_kv_heads * key_width, num_kv_heads * value_width
    weights = embed_dim * (num_heads * (key_width + value_width + 3) + 3 * (keys + values))
    squeezed = (sparse.compressed_size + 1) * hidden_dim * (keys + values)  # a block of all heads
    squeezes = sparse.num_compressed(seq_len) * squeezed
    reads = sum(keys_read(sparse, seq_len))
    products = 2 * num_layers * weights + round(2 * num_layers * squeezes / seq_len)
    heads = num_heads * (key_width + value_width)
    return products, round(2 * num_layers * heads * reads / seq_len)


def moba(config: MobaConfig, seq_len: int) -> ForwardFlops:
    """The forward FLOPs per token of a MoBA, counted as `llama` counts.

    Attention of a layer that chooses is what a query reads of the blocks, and its scores with the
    mean keys of those behind it.
    """
    c, whole = config, llama(config, seq_len)
    inner, sparse = c.num_heads * head_dim(c), c.num_layers - c.full_layers
    scores = sum(t // c.block_size for t in range(seq_len))
    choosing = 4 * keys_read(selection(c), seq_len).selected + 2 * scores
    full = 4 * c.full_layers * _keys_read(seq_len, None, True)
    attention = round(inner * (full + sparse * choosing) / seq_len)
    return dataclasses.replace(whole, attention=attention)


def keys_read(config: NSAConfig, seq_len: int) -> Branches:
    """Keys that all queries of one row read together, in each branch.

    A query is taken to select its own block, of which it reads what is not after it.
    """
    c, found = config, [0, 0, 0]
    for t in range(seq_len):
        own, within = divmod(t, c.block_size)
        found[0] += max(0, (t + 1 - c.compressed_size) // c.stride + 1)
        found[1] += min(own, c.num_blocks - 1) * c.block_size + within + 1
        found[2] += min(t + 1, c.window)
    return Branches(*found)


def _keys_read(seq_len: int, window: int | None, causal: bool) -> int:
    """Keys read by all queries of one row together."""
    window = seq_len if window is None else min(window, seq_len)
    if not causal:
        return seq_len * window
    return window * (window + 1) // 2 + (seq_len - window) * window


def six_nd(params: int | float, tokens: int | float) -> float:
    """6 N D (Kaplan et al. 2020, section 2.1), in float64."""
    return 6.0 * float(params) * float(tokens)
