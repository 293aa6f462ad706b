"""What the claims on sparse attention have in common: small LLaMAs, and long rows of text."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from experiments.study.text import OPTIMIZER, heldout_loss, recipe
from experiments.study.training import train
from lineage_jax.data.packing import Batches
from lineage_jax.data.text import TextData, TextDataset, load_text
from lineage_jax.data.tokenizers import ByteTokenizer
from lineage_jax.kernels import NSAConfig
from lineage_jax.models import llama, native_sparse
from lineage_jax.train.metrics import config_json

BATCH_TOKENS = 1024


def sizes(
    max_len: int, vocab_size: int = ByteTokenizer.vocab_size, width: int = 32
) -> dict[str, Any]:
    """Of every LLaMA here: two layers, two heads that share keys and values."""
    return dict(
        num_layers=2,
        embed_dim=width,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=2 * (8 * width // 6),  # table 2's are 2/3 of 4 embed_dim
        vocab_size=vocab_size,
        max_len=max_len,
        tied_embeddings=True,  # or the tables would be most of the parameters
        init_std=1 / math.sqrt(width),  # with 0.02, meant for 768, so few updates are too few
    )


def native_sparse_model(
    sparse: NSAConfig, max_len: int, compression_dim: int, **changed: int
) -> native_sparse.NativeSparse:
    """One of these sizes, with so many units between a block and what it is squeezed to."""
    config = native_sparse.NativeSparseConfig(
        **sizes(max_len, **changed), sparse=sparse, compression_dim=compression_dim
    )
    return native_sparse.NativeSparse(config)


@functools.cache
def as_large(config: native_sparse.NativeSparseConfig) -> llama.LlamaConfig:
    """A LLaMA of the same sizes whose feed-forward layers are just wide enough.

    It has at least as many parameters.
    """
    names = (field.name for field in dataclasses.fields(llama.LlamaConfig))
    plain = llama.LlamaConfig(**{name: getattr(config, name) for name in names})
    lacks = native_sparse.num_params(config)["total"] - llama.num_params(plain)["total"]
    per_unit = 3 * plain.embed_dim * plain.num_layers
    return dataclasses.replace(plain, mlp_dim=plain.mlp_dim + -(-lacks // per_unit))


@functools.cache
def text(seq_len: int) -> TextDataset:
    """Bytes of the standard library, a hundredth of its modules held out."""
    sizes: dict[str, Any] = dict(seq_len=seq_len, batch_size=BATCH_TOKENS // seq_len)
    return load_text(TextData(**sizes, heldout_fraction=0.01))


def batches(seq_len: int, seed: int) -> Batches:
    """Of the text, in an order of their own for each seed."""
    read = text(seq_len).train
    return Batches(read.stream, batch_size=read.batch_size, seq_len=seq_len, seed=seed)


def setting(module: Any) -> dict[str, Any]:
    """All that a model's numbers on the text depend on but seed, rate and updates."""
    seq_len = module.config.max_len
    return {
        "model": f"{type(module).__name__} {config_json(module.config)}",
        "data": f"{text(seq_len).digest}, {BATCH_TOKENS // seq_len} rows of {seq_len}",
        "optimizer": config_json(OPTIMIZER),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """A language model on rows as long as it can take. Arms of one seed read the same batches."""

    name: str
    module: Any

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return setting(self.module)

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`; the held-out loss."""
        seq_len = self.module.config.max_len
        told: dict[str, Any] = dict(seed=seed, peak=learning_rate, updates=updates)
        params = train(recipe(self.module), batches(seq_len, seed).stack, **told)
        return {"loss": heldout_loss(self.module, params, text(seq_len).heldout)}
