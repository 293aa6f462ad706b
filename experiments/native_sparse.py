"""Trains a Native Sparse Attention on text: `lineage train native_sparse --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import language
from lineage_jax.data.text import TextData
from lineage_jax.kernels import NSAConfig
from lineage_jax.models import native_sparse
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program
from scaling import flops

BATCH_TOKENS = 2**22  # the paper prints none: LLaMA's


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeSparseExperiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: TextData
    model: native_sparse.NativeSparseConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Loads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids, or rows longer, than the model has room for.
          OSError: if the text cannot be read.
        """
        module = native_sparse.NativeSparse(self.model)
        return language.task("native_sparse", self, module, native_sparse.empty_cache)

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        cost = flops.native_sparse(self.model, self.data.seq_len)
        return language.program(self, native_sparse.NativeSparse(self.model), cost.train())


def tiny() -> NativeSparseExperiment:
    """0.6 million parameters on bytes: minutes on a laptop, to see everything work.

    LLaMA's tiny, of whose rows of 128 a query reads 31 squeezed blocks, four others and the last
    32 bytes at most: as the paper's sizes, a window of two blocks, blocks of four strides.
    """
    return NativeSparseExperiment(
        model=native_sparse.NativeSparseConfig(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=256,
            vocab_size=257,
            max_len=128,
            sparse=NSAConfig(
                compressed_size=8,
                stride=4,
                block_size=16,
                num_blocks=4,
                num_first=1,
                num_local=2,
                window=32,
            ),
        ),
        data=TextData(seq_len=128, batch_size=16, heldout_fraction=0.01),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        train=TrainConfig(num_steps=1000),
    )


def nsa_dense() -> NativeSparseExperiment:
    """The paper's attention on its 270 B tokens in rows of 8192 (section 4.1).

    It does not print how it was optimised: as LLaMA's smallest (`experiments/llama.py`).
    """
    return language.preset(
        NativeSparseExperiment,
        native_sparse.nsa_dense(),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            warmup_steps=2000,
            schedule="cosine",
            final_fraction=0.1,
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
        ),
        batch_tokens=BATCH_TOKENS,
        num_steps=270 * 10**9 // BATCH_TOKENS,
    )


PRESETS: Mapping[str, Callable[[], NativeSparseExperiment]] = {
    "tiny": tiny,
    "nsa_dense": nsa_dense,
}


def experiment(name: str = "tiny") -> NativeSparseExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
