"""Native Sparse Attention: three branches of attention that read little, and learn what."""

from lineage_jax.kernels.native_sparse.api import (
    compress,
    compressed_attention,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from lineage_jax.kernels.native_sparse.config import PAPER, Branches, NSAConfig
from lineage_jax.kernels.native_sparse.decode import NSACache, Squeeze, empty_nsa_cache, nsa_decode

__all__ = [
    "PAPER",
    "Branches",
    "NSACache",
    "NSAConfig",
    "Squeeze",
    "compress",
    "compressed_attention",
    "empty_nsa_cache",
    "native_sparse_attention",
    "nsa_decode",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
