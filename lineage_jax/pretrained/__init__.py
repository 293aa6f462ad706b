"""Weights in the format of Hugging Face, in and out: one table of names for each architecture."""

from lineage_jax.pretrained.weights import Pretrained, load

__all__ = ["Pretrained", "load"]
