"""Trains a GPT on text: `lineage train gpt --preset tiny`."""

import dataclasses
from collections.abc import Callable, Mapping

from experiments import language
from lineage_jax.data.text import TextData
from lineage_jax.models import gpt
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.program import Program
from scaling import flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTExperiment:
    """Everything that a GPT run depends on; the command line sets any field of it."""

    data: TextData
    model: gpt.GPTConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Loads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids, or rows longer, than the model has room for.
          OSError: if the text cannot be read.
        """
        return language.task("gpt", self, gpt.GPT(self.model), gpt.empty_cache)

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        cost = flops.gpt(self.model, self.data.seq_len)
        return language.program(self, gpt.GPT(self.model), cost.train())


def preset(
    model: gpt.GPTConfig, *, rate: float, batch_tokens: int, num_steps: int, warmup_steps: int
) -> GPTExperiment:
    """A GPT of a paper's size, with that paper's learning rate and batch."""
    return language.preset(
        GPTExperiment,
        model,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=warmup_steps),
        batch_tokens=batch_tokens,
        num_steps=num_steps,
    )


def tiny() -> GPTExperiment:
    """Half a million parameters on bytes: two minutes on a laptop, to see everything work."""
    return GPTExperiment(
        model=gpt.GPTConfig(
            num_layers=4,
            embed_dim=96,
            num_heads=4,
            vocab_size=257,
            max_len=128,
        ),
        data=TextData(seq_len=128, batch_size=16, heldout_fraction=0.01),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        train=TrainConfig(num_steps=1000),
    )


def gpt1() -> GPTExperiment:
    """Radford et al. 2018, section 4.1: 64 rows of 512 tokens, 2000 steps of warm-up."""
    return preset(
        gpt.gpt1(), rate=2.5e-4, batch_tokens=64 * 512, num_steps=100_000, warmup_steps=2000
    )


def gpt2(model: gpt.GPTConfig, *, rate: float) -> GPTExperiment:
    """Radford et al. 2019, section 2.3: 512 rows of 1024 tokens.

    The paper prints neither learning rates nor steps; these are GPT-3's for that size, over as many
    tokens as nanoGPT's reproduction (300 B).
    """
    return preset(model, rate=rate, batch_tokens=512 * 1024, num_steps=600_000, warmup_steps=715)


def gpt3(model: gpt.GPTConfig, *, rate: float, batch_tokens: int) -> GPTExperiment:
    """Brown et al. 2020, table 2.1 and appendix B: 300 B tokens, 375 M of them warm-up."""
    return preset(
        model,
        rate=rate,
        batch_tokens=batch_tokens,
        num_steps=300_000_000_000 // batch_tokens,
        warmup_steps=375_000_000 // batch_tokens,
    )


PRESETS: Mapping[str, Callable[[], GPTExperiment]] = {
    "tiny": tiny,
    "gpt1": gpt1,
    "gpt2_small": lambda: gpt2(gpt.gpt2_small(), rate=6e-4),
    "gpt2_medium": lambda: gpt2(gpt.gpt2_medium(), rate=3e-4),
    "gpt2_large": lambda: gpt2(gpt.gpt2_large(), rate=2.5e-4),
    "gpt2_xl": lambda: gpt2(gpt.gpt2_xl(), rate=2e-4),
    # Learning rates and batches of table 2.1: 0.5 M tokens as 2^19, and so on.
    "gpt3_125m": lambda: gpt3(gpt.gpt3_125m(), rate=6e-4, batch_tokens=2**19),
    "gpt3_350m": lambda: gpt3(gpt.gpt3_350m(), rate=3e-4, batch_tokens=2**19),
    "gpt3_760m": lambda: gpt3(gpt.gpt3_760m(), rate=2.5e-4, batch_tokens=2**19),
    "gpt3_1_3b": lambda: gpt3(gpt.gpt3_1_3b(), rate=2e-4, batch_tokens=2**20),
    "gpt3_2_7b": lambda: gpt3(gpt.gpt3_2_7b(), rate=1.6e-4, batch_tokens=2**20),
    "gpt3_6_7b": lambda: gpt3(gpt.gpt3_6_7b(), rate=1.2e-4, batch_tokens=2**21),
    "gpt3_13b": lambda: gpt3(gpt.gpt3_13b(), rate=1e-4, batch_tokens=2**21),
    "gpt3_175b": lambda: gpt3(gpt.gpt3_175b(), rate=0.6e-4, batch_tokens=3 * 2**20 + 2**17),
}


def experiment(name: str = "tiny") -> GPTExperiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
