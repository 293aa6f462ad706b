"""Trains a LLaMA on text: `lineage train llama --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import language
from lineage_jax.data.text import TextData
from lineage_jax.models import llama
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program
from scaling import flops

BATCH_TOKENS = 2**22  # table 2 of LLaMA and table 1 of Llama 2 print 4M


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaExperiment:
    """Everything that a LLaMA run depends on; the command line sets any field of it."""

    data: TextData
    model: llama.LlamaConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Loads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids, or rows longer, than the model has room for.
          OSError: if the text cannot be read.
        """
        return language.task("llama", self, llama.Llama(self.model), llama.empty_cache)

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        cost = flops.llama(self.model, self.data.seq_len)
        return language.program(self, llama.Llama(self.model), cost.train())


def preset(
    model: llama.LlamaConfig, *, rate: float, num_tokens: int, epsilon: float = 1e-8
) -> LlamaExperiment:
    """Touvron et al. 2023, section 2.3 (the same in Llama 2, section 2.2, but for epsilon).

    AdamW with betas 0.9 and 0.95 and weight decay 0.1, gradients clipped at 1, 2000 steps of
    warm-up, a cosine down to a tenth. The context is that of the released models.
    """
    return language.preset(
        LlamaExperiment,
        model,
        optimizer=OptimizerConfig(
            learning_rate=rate,
            warmup_steps=2000,
            schedule="cosine",
            final_fraction=0.1,
            b1=0.9,
            b2=0.95,
            epsilon=epsilon,
            weight_decay=0.1,
            max_grad_norm=1.0,
        ),
        batch_tokens=BATCH_TOKENS,
        num_steps=num_tokens // BATCH_TOKENS,
    )


def tiny() -> LlamaExperiment:
    """Half a million parameters on bytes: two minutes on a laptop, to see everything work."""
    return LlamaExperiment(
        model=llama.LlamaConfig(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=256,
            vocab_size=257,
            max_len=128,
        ),
        data=TextData(seq_len=128, batch_size=16, heldout_fraction=0.01),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        train=TrainConfig(num_steps=1000),
    )


PRESETS: Mapping[str, Callable[[], LlamaExperiment]] = {
    "tiny": tiny,
    # Learning rates and tokens of LLaMA's table 2.
    "llama_7b": lambda: preset(llama.llama_7b(), rate=3e-4, num_tokens=10**12),
    "llama_13b": lambda: preset(llama.llama_13b(), rate=3e-4, num_tokens=10**12),
    "llama_33b": lambda: preset(llama.llama_33b(), rate=1.5e-4, num_tokens=14 * 10**11),
    "llama_65b": lambda: preset(llama.llama_65b(), rate=1.5e-4, num_tokens=14 * 10**11),
    # Of Llama 2's table 1; epsilon of its section 2.2.
    "llama2_70b": lambda: preset(
        llama.llama2_70b(), rate=1.5e-4, num_tokens=2 * 10**12, epsilon=1e-5
    ),
    # Llama 3's table 3 and section 3.1: 15 T tokens. Mistral's paper prints neither a learning rate
    # nor tokens: those of LLaMA's table 2.
    "mistral_7b": lambda: preset(llama.mistral_7b(), rate=3e-4, num_tokens=10**12),
    "llama3_8b": lambda: preset(llama.llama3_8b(), rate=3e-4, num_tokens=15 * 10**12),
    "llama3_1_8b": lambda: preset(llama.llama3_1_8b(), rate=3e-4, num_tokens=15 * 10**12),
}


def experiment(name: str = "tiny") -> LlamaExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
