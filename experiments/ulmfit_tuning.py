"""Stage three of ULMFiT, a classifier on a language model; and the rates of layers of stage two."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp

from experiments import classification
from experiments.saved import recorded
from lineage_jax import sharding
from lineage_jax.data.labelled import LabelledData, read_labels
from lineage_jax.data.labelled_batches import end_of_text_marks, shapes
from lineage_jax.models import ulmfit
from lineage_jax.models.ulmfit import Classifier, ClassifierConfig, ULMFiTConfig
from lineage_jax.objectives.labels import label_loss
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.layerwise import LayerwiseConfig, layerwise_adam, slanted_triangular
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.program import Program
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params, PRNGKeyArray

Config = TypeVar("Config", bound=ULMFiTConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULMFiTClassification:
    """Stage three, a classifier: everything that a run depends on."""

    data: LabelledData
    start_from: str | None = None
    """The run of a language model, whose sizes, weights and tokenizer it begins with; without one,
    all begin anew."""
    model: ClassifierConfig
    optimizer: LayerwiseConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig

    def task(self) -> Task:
        """Reads the labelled texts and joins them with the model, objective and optimiser.

        Raises:
          ValueError: if the texts have ids, rows longer, or more labels than the model has room
            for.
          OSError: if they, or what is begun with, cannot be read.
        """
        me: Any = self  # its optimiser is another than what `classification` knows
        made = classification.task("ulmfit", me, end_of_text_marks, encoder_of)
        return dataclasses.replace(made, learning_rate=schedule(self.optimizer, self.train))

    def program(self) -> Program:
        """What is compiled to train this, which needs neither texts nor weights."""
        module, data = Classifier(self.model), self.data
        arrays = shapes(data.batch_size, data.seq_len)
        label = {"label": arrays.pop("label")}
        rows = sharding.named(arrays, ("batch", "length"))
        return Program(
            init=functools.partial(init, module),
            loss_fn=loss_fn(module, train=True),
            eval_loss_fn=loss_fn(module, train=False),
            tx=layerwise_adam(self.optimizer, depth_in_classifier(self.model)),
            batch={**rows, **sharding.named(label, ("batch",))},
            # As the language model's, without the products with the table; a pool costs little.
            flops_per_token=6 * ulmfit.num_params(self.model)["non_embedding"],
            max_grad_norm=self.optimizer.max_grad_norm,
        )

    def settled(self) -> "ULMFiTClassification":
        """The same in the sizes of the model that it begins with, with as many labels as there are.

        Raises:
          OSError, ValueError: if that is no AWD-LSTM, or it or the texts cannot be read.
        """
        model = dataclasses.replace(self.model, num_labels=len(read_labels(self.data)))
        return dataclasses.replace(self, model=sized_as(self.start_from, model))


def schedule(optimizer: LayerwiseConfig, train: TrainConfig) -> Callable[[int], float]:
    """The learning rate of each step."""
    return lambda step: slanted_triangular(optimizer, step, train.num_steps)


def sized_as(folder: str | None, model: Config) -> Config:
    """The model in the sizes of a run's, if one is named.

    Raises:
      ValueError: if the run is of another model.
      OSError: if it cannot be read.
    """
    if folder is None:
        return model
    theirs = recorded(folder)[1].model
    if type(theirs) is not ULMFiTConfig:
        raise ValueError(
            f"--start-from {folder}: wanted a run of ulmfit, got a {type(theirs).__name__}"
        )
    sizes = ("num_layers", "embed_dim", "hidden_dim", "vocab_size")
    return dataclasses.replace(model, **{name: getattr(theirs, name) for name in sizes})


def encoder_of(params: Params) -> Params:
    """What a classifier has of a language model."""
    return {"encoder": params["encoder"]}


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


def depth_in_classifier(model: ULMFiTConfig) -> Callable[[Sequence[str]], int]:
    """How far below the last group of layers a parameter is: the head, the LSTMs, the table."""

    def depth(names: Sequence[str]) -> int:
        if names[0] != "encoder":
            return 0
        return below_top(names[1], model) + 1

    return depth


def depth_in_language_model(model: ULMFiTConfig) -> Callable[[Sequence[str]], int]:
    """The same of a language model, whose table, as it scores words, is in the last group.

    The last LSTM is the other part of that group. In the released code, too, the table learns at
    the rate of the last.
    """

    def depth(names: Sequence[str]) -> int:
        below = below_top(names[1], model) if names[0] == "encoder" else 0
        return below % model.num_layers

    return depth


def below_top(part: str, model: ULMFiTConfig) -> int:
    """How far a part of the encoder is below the last LSTM; the table is below the first."""
    order = ["embed", *(f"layer_{i}" for i in range(model.num_layers))]
    return model.num_layers - order.index(part)
