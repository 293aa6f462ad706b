"""Attention in Pallas: what an accelerator computes faster than its compiler would write it."""

from lineage_jax.kernels.blocks import aligned, stored, unstored
from lineage_jax.kernels.flash import (
    flash_attention,
    flash_backward,
    flash_forward,
    interval_attention,
    interval_attention_with_sums,
)
from lineage_jax.kernels.intervals import Intervals, intervals
from lineage_jax.kernels.native_sparse import (
    PAPER,
    Branches,
    NSACache,
    NSAConfig,
    Squeeze,
    compress,
    compressed_attention,
    empty_nsa_cache,
    native_sparse_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
    window_attention,
)
from lineage_jax.kernels.rotary_tpu import turn, turnable

__all__ = [
    "PAPER",
    "Branches",
    "Intervals",
    "NSACache",
    "NSAConfig",
    "Squeeze",
    "aligned",
    "compress",
    "compressed_attention",
    "empty_nsa_cache",
    "flash_attention",
    "flash_backward",
    "flash_forward",
    "interval_attention",
    "interval_attention_with_sums",
    "intervals",
    "native_sparse_attention",
    "nsa_decode",
    "select_blocks",
    "selected_attention",
    "stored",
    "turn",
    "turnable",
    "unstored",
    "window_attention",
]
