"""Trains a GPT on text: `lineage train gpt --preset tiny`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lineage_jax import sharding
from lineage_jax.data import packing
from lineage_jax.data.text import TextData, TextDataset, load_text
from lineage_jax.models import gpt
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.sampling.decode import generate
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig, adamw, learning_rate
from lineage_jax.train.program import Program
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params, PRNGKeyArray
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
        text = load_text(self.data)
        check_fit(text, self.data, self.model)
        num_steps = self.train.num_steps
        return Task(
            name="gpt",
            program=self.program(),
            learning_rate=lambda step: learning_rate(self.optimizer, step, num_steps),
            train_batch=text.train,
            eval_batches=lambda rows: eval_batches(text, rows),
            summarise=lambda means: with_bits_per_byte(means, text.bytes_per_token),
            sample=sampler(gpt.GPT(self.model), text),
            data_seed=self.data.seed,
            provenance=text.provenance(),
        )

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        model = gpt.GPT(self.model)
        return Program(
            init=lambda key: (init(model, key), {}),
            loss_fn=loss_fn(model, train=True),
            eval_loss_fn=loss_fn(model, train=False),
            tx=adamw(self.optimizer),
            batch=sharding.named(
                packing.shapes(self.data.batch_size, self.data.seq_len), ("batch", "length")
            ),
            flops_per_token=flops.gpt(self.model, self.data.seq_len).train(),
            max_grad_norm=self.optimizer.max_grad_norm,
        )


def init(model: gpt.GPT, key: PRNGKeyArray) -> Params:
    """The model's parameters, boxed with the names of their axes."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def loss_fn(model: gpt.GPT, *, train: bool) -> LossFn:
    """The next-token objective of a GPT."""

    def loss(params, extra, batch, rng):
        logits, _ = model.apply(
            {"params": params},
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            train=train,
            rngs={"dropout": rng},
        )
        value, metrics = next_token_loss(logits, batch["targets"], batch["mask"])
        return value, (extra, metrics)

    return loss


def check_fit(text: TextDataset, data: TextData, model: gpt.GPTConfig) -> None:
    """Refuses ids outside the model's vocabulary and rows longer than its positions."""
    if text.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokens of {text.name} have ids up to {text.vocab_size - 1}, outside the model's "
            f"vocabulary of {model.vocab_size}; take --model.vocab-size {text.vocab_size}"
        )
    if data.seq_len > model.max_len:
        raise ValueError(
            f"rows of --data.seq-len {data.seq_len} are longer than the model's "
            f"max_len={model.max_len}; shorten them, or take --model.max-len {data.seq_len}"
        )


def eval_batches(text: TextDataset, rows: np.ndarray) -> Iterator[Mapping[str, np.ndarray]]:
    """One pass over the held-out text, the given rows of each batch."""
    for step in range(text.heldout.num_batches):
        yield text.heldout(step, rows)


def with_bits_per_byte(means: dict[str, float], bytes_per_token: float | None) -> dict[str, float]:
    """The means, and the loss in bits per byte of text where the text is known."""
    if bytes_per_token is None:
        return means
    return {**means, "bits_per_byte": means["loss"] / np.log(2) / bytes_per_token}


def sampler(
    model: gpt.GPT, text: TextDataset, *, prompts: int = 4, prompt_len: int = 16
) -> Callable[[Params, PRNGKeyArray], str] | None:
    """Continues the first words of held-out rows, to be looked at as training goes on."""
    tokenizer, config = text.tokenizer, model.config
    if tokenizer is None:
        return None
    length = min(config.max_len, 128)
    start = min(prompt_len, length // 2)
    rows = text.heldout(0)["tokens"][:prompts, :start]

    @jax.jit
    def continued(params, rng):
        cache = gpt.empty_cache(config, rows.shape[0], length)
        lengths = jnp.full(rows.shape[0], start)

        def decoder(tokens, positions, cache):
            return model.apply({"params": params}, tokens, positions, cache=cache)

        return generate(decoder, cache, jnp.asarray(rows), lengths, length - start, rng)

    def sample(params, rng):
        new = np.asarray(continued(params, rng))
        pairs = zip(rows, new, strict=True)
        return "\n\n".join(f"{tokenizer.decode(row)}|{tokenizer.decode(ids)}" for row, ids in pairs)

    return sample


def preset(
    model: gpt.GPTConfig, *, rate: float, batch_tokens: int, num_steps: int, warmup_steps: int
) -> GPTExperiment:
    """A GPT of a paper's size, with that paper's learning rate and batch, on a BPE of the text."""
    return GPTExperiment(
        model=model,
        data=TextData(
            tokenizer="bpe",
            vocab_size=model.vocab_size,
            seq_len=model.max_len,
            batch_size=batch_tokens // model.max_len,
        ),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=warmup_steps),
        train=TrainConfig(num_steps=num_steps),
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
