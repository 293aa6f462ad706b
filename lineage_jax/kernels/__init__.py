"""Attention in Pallas: what an accelerator computes faster than its compiler would write it."""

from lineage_jax.kernels.flash import flash_attention, flash_attention_backward

__all__ = ["flash_attention", "flash_attention_backward"]
