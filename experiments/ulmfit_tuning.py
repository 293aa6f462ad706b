"""Stage three of ULMFiT, a classifier on a language model; and how stages two and three begin."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.saved import Saved, open_run
from experiments.speaking import text_tokenizer
from lineage_jax import sharding
from lineage_jax.data.labelled import LabelledData, LabelledDataset, load_labelled
from lineage_jax.data.labelled_batches import shapes
from lineage_jax.models import ulmfit
from lineage_jax.models.ulmfit import Classifier, ULMFiTConfig
from lineage_jax.objectives.labels import label_loss
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.layerwise import LayerwiseConfig, layerwise_adam, slanted_triangular
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.program import Program
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyExperiment:
    """Stage three: a classifier on the language model of a run."""

    data: LabelledData
    model: ULMFiTConfig
    optimizer: LayerwiseConfig
    start: str | None = None
    """The run to begin from, of stage two or one; without it, all is learnt from the labels."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Reads the labelled texts and joins them with the model, objective and optimiser.

        Raises:
          ValueError: if `start` is no run of such a model; if the texts have ids or labels, or rows
            longer, than the model has room for.
          OSError: if the run or the texts cannot be read.
        """
        begun = None if self.start is None else start_of(self.start, self.model)
        tokenizer = None if begun is None else text_tokenizer(begun[0], begun[1])
        texts = load_labelled(self.data, tokenizer)
        check_fit(texts, self.model)
        return Task(
            name="ulmfit",
            program=self.program(),
            learning_rate=functools.partial(
                slanted_triangular, self.optimizer, num_steps=self.train.num_steps
            ),
            train_batch=texts.train,
            eval_batches=functools.partial(eval_batches, texts),
            first_state=begun and (lambda state: started(state, begun[1].params)),
            data_seed=self.data.seed,
            provenance=texts.provenance(),
        )

    def program(self) -> Program:
        """What is compiled to train this, which needs no data."""
        module, data = Classifier(self.model), self.data
        of_rows = shapes(data.batch_size, data.seq_len)
        label = {"label": of_rows.pop("label")}
        return Program(
            init=functools.partial(init, module),
            loss_fn=loss_fn(module, train=True),
            eval_loss_fn=loss_fn(module, train=False),
            tx=by_layer(self.optimizer, self.model, classifier=True),
            batch=sharding.named(of_rows, ("batch", "length")) | sharding.named(label, ("batch",)),
            # As the language model's, without the products with the table; a pool costs little.
            flops_per_token=6 * ulmfit.num_params(self.model)["non_embedding"],
            max_grad_norm=self.optimizer.max_grad_norm,
        )


def init(module: Classifier, key: PRNGKeyArray) -> tuple[Params, Any]:
    """The parameters, boxed with the names of their axes, and what batch norm has counted."""
    made = module.init(key, jnp.zeros((1, 1), jnp.int32))
    return made["params"], {"batch_stats": made["batch_stats"]}


def loss_fn(module: Classifier, *, train: bool) -> LossFn:
    """The cross-entropy of the labels."""

    def loss(params, extra, batch, rng):
        logits, changed = module.apply(
            {"params": params, **extra},
            batch["tokens"],
            batch["mask"],
            train=train,
            rngs={"dropout": rng},
            mutable=["batch_stats"],
        )
        value, metrics = label_loss(logits, batch["label"], batch["mask"].any(-1))
        return value, (changed, metrics)

    return loss


def eval_batches(texts: LabelledDataset, rows: np.ndarray) -> Iterator[Mapping[str, np.ndarray]]:
    """One pass over the held-out texts, the given rows of each batch."""
    for step in range(texts.heldout.num_batches):
        yield texts.heldout(step, rows)


def check_fit(texts: LabelledDataset, config: ULMFiTConfig) -> None:
    """Refuses ids outside the model's vocabulary, and labels that it has no score for."""
    for name, found in (
        ("vocab_size", texts.tokenizer.vocab_size),
        ("num_labels", len(texts.labels)),
        ("max_len", texts.train.seq_len),
    ):
        if found > getattr(config, name):
            raise ValueError(
                f"{texts.name} needs a {name} of {found}, the model's is {getattr(config, name)}; "
                f"take --model.{name.replace('_', '-')} {found}"
            )


def by_layer(
    optimizer: LayerwiseConfig, model: ULMFiTConfig, *, classifier: bool = False
) -> optax.GradientTransformation:
    """Adam with the rates of Howard and Ruder 2018, section 3.2; the groups are the layers.

    The last group of a classifier is its head, the first its table of words. A language model
    scores words by that table, which is of its last group therefore, with the layer below.
    """
    layers = [f"layer_{i}" for i in range(model.num_layers)]
    order = ["embed", *layers, "head"] if classifier else layers

    def depth(names: Sequence[str]) -> int:
        part = names[1] if names[0] == "encoder" else "head"
        return order[::-1].index(part) if part in order else 0

    return layerwise_adam(optimizer, depth)


def start_of(folder: str | None, model: ULMFiTConfig) -> tuple[str, Saved]:
    """The run of a language model to begin from, and its folder.

    Raises:
      ValueError: if none is named, or it is another model.
      OSError: if it cannot be read.
    """
    if folder is None:
        raise ValueError(
            "wanted --start, the run of a language model: `lineage train ulmfit` makes one"
        )
    run = open_run(folder)
    sizes = ("num_layers", "embed_dim", "hidden_dim", "vocab_size")
    fits = run.milestone == "ulmfit" and "bias" in run.params  # of words: no classifier has it
    if not fits or any(getattr(run.experiment.model, n) != getattr(model, n) for n in sizes):
        wanted = ", ".join(f"{name}={getattr(model, name)}" for name in sizes)
        raise ValueError(f"wanted the run of an ulmfit of {wanted} as --start, got {folder}")
    return folder, run


def started(state: Any, params: Params) -> TrainState:
    """The state with these parameters, and its own where there are none of that name."""

    def place(new: Any, old: Any) -> jax.Array:  # a copy: the state's buffers will be given away
        return jax.device_put(jnp.array(new, old.dtype, copy=True), old.sharding)

    shared = {name: params[name] for name in state.params if name in params}
    placed = jax.tree.map(place, shared, {name: state.params[name] for name in shared})
    return state.replace(params={**state.params, **placed})
