"""The lineage of modern AI in JAX: from the LSTM encoder-decoder to Native Sparse Attention."""

__version__ = "0.1.0"
