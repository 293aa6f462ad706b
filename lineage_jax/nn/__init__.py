"""Layers that two or more milestones use. They know no paper; a milestone file arranges them."""

from lineage_jax.nn.attention import (
    Attention,
    CrossAttention,
    KVCache,
    decoder_mask,
    dot_product_attention,
)
from lineage_jax.nn.embed import Embed
from lineage_jax.nn.linear import Linear, project
from lineage_jax.nn.masks import Mask, causal_mask, segment_mask
from lineage_jax.nn.mlp import MLP, GatedMLP, exact_gelu
from lineage_jax.nn.native_sparse import (
    AttentionName,
    DecoderCache,
    NativeSparseAttention,
    check_attention,
    nsa_caches,
)
from lineage_jax.nn.norms import LayerNorm, RMSNorm
from lineage_jax.nn.positions import sinusoids
from lineage_jax.nn.recurrent import (
    GRU,
    LSTM,
    LSTMStack,
    LSTMState,
    UniformEmbed,
    gru_cell,
    lstm_cell,
    over_time,
)
from lineage_jax.nn.rotary import RopeScaling, rotate
from lineage_jax.nn.stack import Remat, stack

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "Attention",
    "AttentionName",
    "CrossAttention",
    "DecoderCache",
    "Embed",
    "GatedMLP",
    "KVCache",
    "LSTMStack",
    "LSTMState",
    "LayerNorm",
    "Linear",
    "Mask",
    "NativeSparseAttention",
    "RMSNorm",
    "Remat",
    "RopeScaling",
    "UniformEmbed",
    "causal_mask",
    "check_attention",
    "decoder_mask",
    "dot_product_attention",
    "exact_gelu",
    "gru_cell",
    "lstm_cell",
    "nsa_caches",
    "over_time",
    "project",
    "rotate",
    "segment_mask",
    "sinusoids",
    "stack",
]
