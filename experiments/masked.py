"""What every experiment on masked text has in common, whatever its encoder.

A model here is a module with BERT's call (`lineage_jax.models.bert`): tokens, types and the mask of
padding in, scores of tokens out, and for pairs of sentences their scores too.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lineage_jax import sharding
from lineage_jax.data import masking
from lineage_jax.data.masking import MASK_RATE, MaskedBatches, Pairs, SpecialTokens
from lineage_jax.data.text import TextData, TextDataset, load_text
from lineage_jax.models.bert import BertConfig
from lineage_jax.objectives.masked import masked_token_loss, pretraining_loss
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig, adamw, learning_rate
from lineage_jax.train.program import Program
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """What is left out of the text, and what a row holds besides."""

    pairs: Pairs = "none"
    """Rows of one text ("none"); of two parts, the second perhaps another document's ("next",
    BERT); or of two that may be swapped ("order", ALBERT)."""
    dynamic: bool = True
    """Draw masks anew in each epoch (RoBERTa, section 4.1), or once for all (BERT)."""
    mask_rate: float = MASK_RATE
    """The share of words that are predicted (BERT, section 3.1)."""


class Experiment(Protocol):
    """What a run on masked text depends on."""

    @property
    def data(self) -> TextData: ...
    @property
    def masking(self) -> MaskingConfig: ...
    @property
    def model(self) -> Any: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    def program(self) -> Program: ...


def task(name: str, experiment: Experiment) -> Task:
    """Reads the text and joins it with the program.

    Args:
      name: of the milestone.
      experiment: its settings.

    Raises:
      ValueError: if the text has ids, or rows longer, than the model has room for.
      OSError: if the text cannot be read.
    """
    data, config, optimizer = experiment.data, experiment.model, experiment.optimizer
    text = load_text(data)
    special = masking.special_tokens_after(text.vocab_size)
    check_fit(text, special, data, config)

    def batches(stream: Any, **settings: Any) -> MaskedBatches:
        return MaskedBatches(
            stream,
            special,
            batch_size=data.batch_size,
            seq_len=data.seq_len,
            seed=data.seed,
            **dataclasses.asdict(experiment.masking),
            **settings,
        )

    train = batches(text.train.stream)
    heldout = batches(text.heldout.stream, shuffle=False)

    def eval_batches(rows: np.ndarray) -> Iterator[Mapping[str, np.ndarray]]:
        for step in range(heldout.num_batches):
            yield heldout(step, rows)

    return Task(
        name=name,
        program=experiment.program(),
        learning_rate=lambda step: learning_rate(optimizer, step, experiment.train.num_steps),
        train_batch=train,
        eval_batches=eval_batches,
        data_seed=data.seed,
        provenance=text.provenance(),
    )


def program(experiment: Experiment, module: nn.Module, loss: LossFn, evaluation: LossFn) -> Program:
    """What is compiled to train `module`, which needs no data."""
    data, optimizer = experiment.data, experiment.optimizer
    arrays = masking.shapes(data.batch_size, data.seq_len)
    rows = {name: array for name, array in arrays.items() if len(array[0]) == 2}
    labels = {name: array for name, array in arrays.items() if len(array[0]) == 1}
    return Program(
        init=lambda key: (init(module, key), {}),
        loss_fn=loss,
        eval_loss_fn=evaluation,
        tx=adamw(optimizer),
        batch={
            **sharding.named(rows, ("batch", "length")),
            **sharding.named(labels, ("batch",)),
        },
        flops_per_token=flops_per_token(experiment.model, data.seq_len),
        max_grad_norm=optimizer.max_grad_norm,
    )


def init(module: nn.Module, key: PRNGKeyArray) -> Params:
    """The model's parameters, boxed with the names of their axes."""
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def loss_fn(
    module: nn.Module, *, train: bool, pairs: bool = False, first_position: int = 0
) -> LossFn:
    """What was left out and, of models that score them, whether a pair is one.

    Args:
      module: the model.
      train: whether dropout acts.
      pairs: whether it scores pairs.
      first_position: of a row; padding, on the right, goes on counting.
    """

    def loss(params, extra, batch, rng):
        index = first_position + jnp.arange(batch["tokens"].shape[1])[None]
        found = module.apply(
            {"params": params},
            batch["tokens"],
            batch["types"] if pairs else None,
            jnp.broadcast_to(index, batch["tokens"].shape),
            mask=batch["mask"],
            train=train,
            rngs={"dropout": rng},
        )
        targets = batch["targets"], batch["target_mask"]
        if pairs:
            real = batch["mask"].any(-1)
            value, metrics = pretraining_loss(*found, *targets, batch["label"], real)
        else:
            value, metrics = masked_token_loss(found, *targets)
        return value, (extra, metrics)

    return loss


def check_fit(text: TextDataset, special: SpecialTokens, data: TextData, config: Any) -> None:
    """Refuses ids outside the model's vocabulary and rows longer than it can place."""
    if special.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokens of {text.name} and four special ones have ids up to "
            f"{special.vocab_size - 1}, outside the model's vocabulary of {config.vocab_size}; "
            f"take --model.vocab-size {special.vocab_size}"
        )
    if data.seq_len > config.max_len:
        raise ValueError(
            f"rows of --data.seq-len {data.seq_len} are longer than the model's "
            f"max_len={config.max_len}; shorten them, or take --model.max-len {data.seq_len}"
        )


def flops_per_token(config: BertConfig, seq_len: int) -> int:
    """Of forward and backward: blocks, attention both ways, and the scores of all positions."""
    c = config
    weights = 4 * c.embed_dim**2 + 2 * c.embed_dim * (c.mlp_dim or 4 * c.embed_dim)
    scores = 4 * c.embed_dim * seq_len
    return 3 * (c.num_layers * (2 * weights + scores) + 2 * c.embed_dim * c.vocab_size)


def text(model: BertConfig, batch_size: int) -> TextData:
    """A BPE of the text, in rows as long as the model reads."""
    return TextData(
        tokenizer="bpe",
        vocab_size=model.vocab_size - 4,  # and the special tokens
        seq_len=model.max_len,
        batch_size=batch_size,
    )
