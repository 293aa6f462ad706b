"""Attention in Pallas: what an accelerator computes faster than its compiler would write it."""

from lineage_jax.kernels.blocks import aligned, stored, unstored
from lineage_jax.kernels.flash import flash_attention, flash_attention_backward
from lineage_jax.kernels.rotary_tpu import turn, turnable

__all__ = [
    "aligned",
    "flash_attention",
    "flash_attention_backward",
    "stored",
    "turn",
    "turnable",
    "unstored",
]
