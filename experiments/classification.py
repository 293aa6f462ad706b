"""What every fine-tuning on labelled texts has in common, whatever its model.

A model here is one that was trained on text, from a run of ours or a Hugging Face folder, under a
new head that scores labels. All of its weights go on learning; its tokenizer is the one that it was
trained with.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import speaking
from experiments.saved import is_run, open_model, recorded
from lineage_jax import sharding
from lineage_jax.data import labelled_batches
from lineage_jax.data.labelled import LabelledData, LabelledDataset, load_labelled, read_labels
from lineage_jax.data.labelled_batches import Marks
from lineage_jax.data.tokenizers import Tokenizer
from lineage_jax.pretrained.folders import read_config
from lineage_jax.pretrained.weights import of
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig, adamw, learning_rate
from lineage_jax.train.program import Program
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params, PRNGKeyArray

COMPUTED = ("dropout_rate", "dtype", "param_dtype", "remat", "unroll")
"""Settings of a model that say how it is computed, and nothing of its weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """What every run on labelled texts depends on; the command line sets any field of it."""

    data: LabelledData
    start_from: str | None = None
    """A run, or a Hugging Face folder, whose model, weights and tokenizer it begins with; without
    one, all begin anew, the model is --model and the tokenizer --data.tokenizer."""
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig


class Experiment(Protocol):
    """A `Classification` of some model."""

    @property
    def data(self) -> LabelledData: ...
    @property
    def start_from(self) -> str | None: ...
    @property
    def model(self) -> Any: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    def program(self) -> Program: ...


def task(
    name: str,
    experiment: Experiment,
    marks: Callable[[Tokenizer], Marks],
    body: Callable[[Params], Params],
) -> Task:
    """Reads texts and labels, and what is begun with, and joins them with the program.

    Args:
      name: of the milestone.
      experiment: its settings.
      marks: from the tokenizer, ids around texts.
      body: from the parameters of what is begun with, those that go on, by our names of them.

    Raises:
      ValueError: if the texts have ids, rows longer, or more labels than the model has room for.
      OSError: if they, or what is begun with, cannot be read.
    """
    optimizer, num_steps, start = experiment.optimizer, experiment.train.num_steps, None
    tokenizer = None
    if experiment.start_from is not None:
        start = open_model(experiment.start_from)
        tokenizer = speaking.text_tokenizer(experiment.start_from, start)
    texts = load_labelled(experiment.data, tokenizer, marks)
    check_fit(texts, experiment.data, experiment.model)

    def eval_batches(rows: np.ndarray) -> Iterator[Mapping[str, np.ndarray]]:
        for step in range(texts.heldout.num_batches):
            yield texts.heldout(step, rows)

    def first_state(state: Any) -> TrainState:
        assert start is not None
        return state.replace(params=begun(state.params, body(start.params)))

    return Task(
        name=name,
        program=experiment.program(),
        learning_rate=lambda step: learning_rate(optimizer, step, num_steps),
        train_batch=texts.train,
        eval_batches=eval_batches,
        first_state=None if start is None else first_state,
        data_seed=experiment.data.seed,
        provenance=texts.provenance(),
    )


def program(
    experiment: Experiment,
    module: nn.Module,
    flops_per_token: int,
    loss: LossFn,
    evaluation: LossFn,
) -> Program:
    """What is compiled to train `module`, which needs neither texts nor weights."""
    data, optimizer = experiment.data, experiment.optimizer
    arrays = labelled_batches.shapes(data.batch_size, data.seq_len)
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
        flops_per_token=flops_per_token,
        max_grad_norm=optimizer.max_grad_norm,
    )


def init(module: nn.Module, key: PRNGKeyArray) -> Params:
    """The model's parameters, boxed with the names of their axes."""
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def settled_model(experiment: Experiment, kind: type, **changes: Any) -> Any:
    """The model's settings once it is known what it begins with and which labels there are.

    Args:
      experiment: whose `start_from` has a model of that kind.
      kind: of that model's config.
      **changes: to be made to that config, from it: `vocab_size` is called with its own.

    Raises:
      ValueError: if the model that is begun with is of another kind.
      OSError: if it, or the texts, cannot be read.
    """
    model, found = experiment.model, {"num_labels": len(read_labels(experiment.data))}
    folder = experiment.start_from
    if folder is not None:
        theirs: Any = recorded(folder)[1].model if is_run(folder) else _config(folder)
        if type(theirs) is not kind:
            raise ValueError(
                f"--start-from {folder}: wanted a model of {kind.__name__}, got "
                f"{type(theirs).__name__}"
            )
        fields = dict(vars(theirs))
        fields |= {name: change(fields[name]) for name, change in changes.items()}
        found = {**fields, **{name: getattr(model, name) for name in COMPUTED}, **found}
    return dataclasses.replace(model, **found)


def begun(new: Params, old: Params) -> Params:
    """Fresh parameters, but for those that were learnt before.

    A table with more rows than it had goes on with its old rows: the last are new words.

    Args:
      new: all of the model's.
      old: some of them, as nested.

    Raises:
      ValueError: if one of `old` is none of the model's, or has another shape.
    """
    unknown = set(old) - set(new)
    if unknown:
        raise ValueError(f"the model has no parameters called {', '.join(sorted(unknown))}")

    def one(path: str, fresh: Any, learnt: Any) -> Any:
        if isinstance(fresh, Mapping):
            return {
                name: one(f"{path}/{name}", leaf, learnt[name]) if name in learnt else leaf
                for name, leaf in fresh.items()
            }
        rows = learnt.shape[0]
        if fresh.shape[1:] != learnt.shape[1:] or not (
            fresh.shape == learnt.shape or (path.endswith("table") and fresh.shape[0] > rows)
        ):
            raise ValueError(
                f"{path}: wanted shape {fresh.shape}, as the model's settings say, got "
                f"{learnt.shape} to begin with"
            )
        learnt = np.asarray(learnt).astype(fresh.dtype)
        if fresh.shape == learnt.shape:
            return jax.device_put(learnt, fresh.sharding)
        add = jax.jit(lambda fresh: fresh.at[:rows].set(learnt), out_shardings=fresh.sharding)
        return add(fresh)

    return {name: one(name, leaf, old[name]) if name in old else leaf for name, leaf in new.items()}


def check_fit(texts: LabelledDataset, data: LabelledData, config: Any) -> None:
    """Refuses ids, rows and labels that the model has no room for."""
    marks = dataclasses.astuple(texts.train.marks)
    vocab_size = max(texts.tokenizer.vocab_size, *(i + 1 for i in marks))
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokens of {texts.name} and the marks around them have ids up to "
            f"{vocab_size - 1}, outside the model's vocabulary of {config.vocab_size}; take "
            f"--model.vocab-size {vocab_size}"
        )
    if data.seq_len > config.max_len:
        raise ValueError(
            f"rows of --data.seq-len {data.seq_len} are longer than the model's "
            f"max_len={config.max_len}; shorten them"
        )
    if len(texts.labels) != config.num_labels:
        raise ValueError(
            f"{texts.name} has {len(texts.labels)} labels, and the model {config.num_labels}; take "
            f"--model.num-labels {len(texts.labels)}"
        )


def _config(folder: str) -> Any:
    """Of a Hugging Face folder's model."""
    theirs = read_config(folder)
    return of(theirs).config(theirs)
