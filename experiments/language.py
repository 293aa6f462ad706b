"""What every experiment on next tokens has in common, whatever its model.

A model here is a module with GPT's call (`lineage_jax.models.gpt`): tokens, positions, segment ids
and a cache in, logits and the cache out; its config has a `vocab_size` and a `max_len`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils

from lineage_jax import sharding
from lineage_jax.data import packing
from lineage_jax.data.text import TextData, TextDataset, load_text
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.sampling.decode import generate
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig, adamw, learning_rate
from lineage_jax.train.program import Program
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params, PRNGKeyArray


class Experiment(Protocol):
    """What a run on text depends on."""

    @property
    def data(self) -> TextData: ...
    @property
    def model(self) -> Any: ...
    @property
    def optimizer(self) -> Any: ...
    @property
    def train(self) -> TrainConfig: ...
    def program(self) -> Program: ...


E = TypeVar("E", bound=Experiment)


def task(
    name: str, experiment: Experiment, module: nn.Module, empty_cache: Callable[..., Any]
) -> Task:
    """Loads the text and joins it with the program.

    Args:
      name: of the milestone.
      experiment: its settings.
      module: the model of `experiment.model`.
      empty_cache: from that config, rows and positions, a cache.

    Raises:
      ValueError: if the text has ids, or rows longer, than the model has room for.
      OSError: if the text cannot be read.
    """
    config, optimizer = experiment.model, experiment.optimizer
    num_steps = experiment.train.num_steps
    text = load_text(experiment.data)
    check_fit(text, experiment.data, config)
    return Task(
        name=name,
        program=experiment.program(),
        learning_rate=lambda step: learning_rate(optimizer, step, num_steps),
        train_batch=text.train,
        eval_batches=functools.partial(eval_batches, text),
        summarise=lambda means: with_bits_per_byte(means, text.bytes_per_token),
        sample=sampler(module, functools.partial(empty_cache, config), text, config.max_len),
        data_seed=experiment.data.seed,
        provenance=text.provenance(),
    )


def program(experiment: Experiment, module: nn.Module, flops_per_token: int) -> Program:
    """What is compiled to train `module`, which needs no data."""
    data, optimizer = experiment.data, experiment.optimizer
    return Program(
        init=lambda key: (init(module, key), {}),
        loss_fn=loss_fn(module, train=True),
        eval_loss_fn=loss_fn(module, train=False),
        tx=adamw(optimizer),
        batch=sharding.named(packing.shapes(data.batch_size, data.seq_len), ("batch", "length")),
        flops_per_token=flops_per_token,
        max_grad_norm=optimizer.max_grad_norm,
    )


def init(module: nn.Module, key: PRNGKeyArray) -> Params:
    """The model's parameters, boxed with the names of their axes."""
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def loss_fn(module: nn.Module, *, train: bool) -> LossFn:
    """The next-token objective of a model."""

    def loss(params, extra, batch, rng):
        logits, _ = module.apply(
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


def check_fit(text: TextDataset, data: TextData, config: Any) -> None:
    """Refuses ids outside the model's vocabulary and rows longer than it can place."""
    if text.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokens of {text.name} have ids up to {text.vocab_size - 1}, outside the model's "
            f"vocabulary of {config.vocab_size}; take --model.vocab-size {text.vocab_size}"
        )
    if data.seq_len > config.max_len:
        raise ValueError(
            f"rows of --data.seq-len {data.seq_len} are longer than the model's "
            f"max_len={config.max_len}; shorten them, or take --model.max-len {data.seq_len}"
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
    module: nn.Module,
    empty_cache: Callable[[int, int], Any],
    text: TextDataset,
    max_len: int,
    *,
    prompts: int = 4,
    prompt_len: int = 16,
) -> Callable[[Params, PRNGKeyArray], str] | None:
    """Continues the first words of held-out rows, to be looked at as training goes on."""
    tokenizer = text.tokenizer
    if tokenizer is None:
        return None
    length = min(max_len, 128)
    start = min(prompt_len, length // 2)
    rows = text.heldout(0)["tokens"][:prompts, :start]

    @jax.jit
    def continued(params, rng):
        lengths = jnp.full(rows.shape[0], start)

        def decoder(tokens, positions, cache, mask=None):
            return module.apply({"params": params}, tokens, positions, cache=cache, mask=mask)

        cache = empty_cache(rows.shape[0], length)
        return generate(decoder, cache, jnp.asarray(rows), lengths, length - start, rng)

    def sample(params, rng):
        new = multihost_utils.process_allgather(continued(params, rng), tiled=True)
        pairs = zip(rows, new, strict=True)
        return "\n\n".join(f"{tokenizer.decode(row)}|{tokenizer.decode(ids)}" for row, ids in pairs)

    return sample


def preset(
    kind: Callable[..., E],
    model: Any,
    *,
    optimizer: OptimizerConfig,
    batch_tokens: int,
    num_steps: int,
) -> E:
    """An experiment of a paper's size, with its learning rate and batch, on a BPE of the text."""
    return kind(
        model=model,
        data=TextData(
            tokenizer="bpe",
            vocab_size=model.vocab_size,
            seq_len=model.max_len,
            batch_size=batch_tokens // model.max_len,
        ),
        optimizer=optimizer,
        train=TrainConfig(num_steps=num_steps),
    )
