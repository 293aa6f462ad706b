"""Trains a T5 on text with spans left out: `lineage train t5 --preset tiny`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments import translation
from lineage_jax.data.pair_batches import shapes
from lineage_jax.data.span_corruption import (
    DENSITY,
    SPAN_LEN,
    DenoisingBatches,
    Objective,
    longest_text,
    row_lengths,
)
from lineage_jax.data.text import TextData, load_text
from lineage_jax.models import t5
from lineage_jax.models.t5 import T5, T5Config
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig, learning_rate
from lineage_jax.train.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """What is left out of the text."""

    objective: Objective = "span_corruption"
    """What source and target are made of: spans (section 3.1.4), or what T5 was compared with."""
    noise_density: float = DENSITY
    """The part of a text that is noise (section 3.1.4)."""
    mean_span_len: float = SPAN_LEN
    """Mean length of a span of noise, in tokens (section 3.7)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Experiment:
    """Everything that a run depends on; the command line sets any field of it."""

    data: TextData
    """Its rows are sources of span corruption: texts are as long as fill them."""
    denoising: DenoisingConfig = dataclasses.field(default_factory=DenoisingConfig)
    model: T5Config
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    @property
    def text_len(self) -> int:
        """Tokens of a text, the same for every objective."""
        noise = self.denoising
        return longest_text(self.data.seq_len, noise.noise_density, noise.mean_span_len)

    def task(self) -> Task:
        """Reads the text and joins it with the model, the objective and the optimiser.

        Raises:
          ValueError: if the text has ids that the model has no row for, or takes for sentinels.
          OSError: if the text cannot be read.
        """
        text = load_text(self.data)
        if text.tokenizer is None:
            raise ValueError("wanted text, or tokens with their tokenizer.json: T5 needs its end")
        end = text.tokenizer.end_of_text

        def batches(stream: Any, **settings: Any) -> DenoisingBatches:
            return DenoisingBatches(
                stream,
                batch_size=self.data.batch_size,
                text_len=self.text_len,
                vocab_size=self.model.vocab_size,
                start=end,
                end=end,
                seed=self.data.seed,
                **dataclasses.asdict(self.denoising),
                **settings,
            )

        heldout = batches(text.heldout.stream, shuffle=False)

        def eval_batches(rows: np.ndarray) -> Iterator[Mapping[str, np.ndarray]]:
            for step in range(heldout.num_batches):
                yield heldout(step, rows)

        return Task(
            name="t5",
            program=self.program(),
            learning_rate=lambda step: learning_rate(self.optimizer, step, self.train.num_steps),
            train_batch=batches(text.train.stream),
            eval_batches=eval_batches,
            data_seed=self.data.seed,
            provenance=text.provenance(),
        )

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        noise = self.denoising
        lengths = row_lengths(
            noise.objective, self.text_len, noise.noise_density, noise.mean_span_len
        )
        rows = shapes(self.data.batch_size, *lengths)
        return translation.program(self.optimizer, T5(self.model), rows)


def tiny() -> T5Experiment:
    """Half a million parameters on bytes: two minutes on a laptop, to see everything work."""
    return T5Experiment(
        model=T5Config(
            num_encoder_layers=2,
            num_decoder_layers=2,
            embed_dim=96,
            num_heads=4,
            head_dim=24,
            mlp_dim=256,
            vocab_size=288,  # 257 and room for sentinels
            dropout_rate=0.0,
        ),
        data=TextData(seq_len=128, batch_size=16, heldout_fraction=0.01),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, weight_decay=0.0),
        train=TrainConfig(num_steps=1000),
    )


def preset(model: T5Config) -> T5Experiment:
    """Raffel et al. 2019, sections 3.1.2 and 3.7: 2048 rows of 512 tokens, a million steps.

    By Adam here, at a tenth of its rate, where the paper has AdaFactor (Shazeer and Stern 2018).
    """
    return T5Experiment(
        model=model,
        data=TextData(tokenizer="bpe", vocab_size=32_000, seq_len=512, batch_size=2048),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="rsqrt",
            warmup_steps=10_000,
            b2=0.999,
            weight_decay=0.0,
        ),
        train=TrainConfig(num_steps=1_000_000),
    )


PRESETS: Mapping[str, Callable[[], T5Experiment]] = {
    "tiny": tiny,
    "small": lambda: preset(t5.t5_small()),
    "base": lambda: preset(t5.t5_base()),
    "large": lambda: preset(t5.t5_large()),
    "3b": lambda: preset(t5.t5_3b()),
    "11b": lambda: preset(t5.t5_11b()),
    "v1_1_small": lambda: preset(t5.t5_v1_1_small()),
    "v1_1_base": lambda: preset(t5.t5_v1_1_base()),
    "v1_1_large": lambda: preset(t5.t5_v1_1_large()),
    "v1_1_xl": lambda: preset(t5.t5_v1_1_xl()),
    "v1_1_xxl": lambda: preset(t5.t5_v1_1_xxl()),
}


def experiment(name: str = "tiny") -> T5Experiment:
    """The preset of that name; the command line then changes any field of it."""
    return PRESETS[name]()
