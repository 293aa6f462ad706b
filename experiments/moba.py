"""Trains a MoBA on text: `lineage train moba --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import language
from lineage_jax.data.text import TextData
from lineage_jax.models import moba
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program
from scaling import flops

BATCH_TOKENS = 2**22  # the paper prints none: LLaMA's


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobaExperiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: TextData
    model: moba.MobaConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Loads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids, or rows longer, than the model has room for.
          OSError: if the text cannot be read.
        """
        module = moba.Moba(self.model)
        return language.task("moba", self, module, moba.empty_cache)

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        cost = flops.moba(self.model, self.data.seq_len)
        return language.program(self, moba.Moba(self.model), cost.train())


def tiny() -> MobaExperiment:
    """Half a million parameters on bytes: minutes on a laptop, to see everything work.

    LLaMA's tiny, of whose rows of 128 a query reads 48 bytes at most; the last layer reads all.
    """
    return MobaExperiment(
        model=moba.MobaConfig(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=256,
            vocab_size=257,
            max_len=128,
            block_size=16,
            top_k=3,
            full_layers=1,
        ),
        data=TextData(seq_len=128, batch_size=16, heldout_fraction=0.01),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        train=TrainConfig(num_steps=1000),
    )


def moba_8b() -> MobaExperiment:
    """Llama 3.1 8B read on over 100 B tokens in rows of 2^20 (section 3.3).

    The paper does not print how that was optimised: as LLaMA's smallest (`experiments/llama.py`).
    """
    return language.preset(
        MobaExperiment,
        moba.moba_8b(),
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
        num_steps=100 * 10**9 // BATCH_TOKENS,
    )


PRESETS: Mapping[str, Callable[[], MobaExperiment]] = {
    "tiny": tiny,
    "moba_8b": moba_8b,
}


def experiment(name: str = "tiny") -> MobaExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
