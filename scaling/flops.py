"""How many floating-point operations training takes, counted by closed forms.

A multiplication and an addition are two operations. The backward pass takes twice the forward's.
Every count is a Python int: 6 N D passes the largest int64 long before the largest model.
"""

import dataclasses

from lineage_jax.models.gpt import GPTConfig
from lineage_jax.models.llama import LlamaConfig, head_dim

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
    do. Norms, biases, softmax and look-ups are left out, as in both.

    Args:
      config: the model.
      seq_len: tokens in a row.
      causal: count the half of the scores that the mask leaves, or all of them, as both papers do.
    """
    c = config
    inner = c.num_heads * (c.head_dim or c.embed_dim // c.num_heads)
    mlp_dim = c.mlp_dim or 4 * c.embed_dim
    weights = c.num_layers * (4 * c.embed_dim * inner + 2 * c.embed_dim * mlp_dim)
    reads = 0
    for layer in range(c.num_layers):
        banded = c.local_window is not None and layer % 2 == 1
        reads += _keys_read(seq_len, c.local_window if banded else None, causal)
    return ForwardFlops(
        blocks=2 * weights,
        attention=round(4 * inner * reads / seq_len),
        head=2 * c.embed_dim * c.vocab_size,
    )


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


def _keys_read(seq_len: int, window: int | None, causal: bool) -> int:
    """Keys read by all queries of one row together."""
    window = seq_len if window is None else min(window, seq_len)
    if not causal:
        return seq_len * window
    return window * (window + 1) // 2 + (seq_len - window) * window


def six_nd(params: int | float, tokens: int | float) -> float:
    """6 N D (Kaplan et al. 2020, section 2.1), in float64."""
    return 6.0 * float(params) * float(tokens)
