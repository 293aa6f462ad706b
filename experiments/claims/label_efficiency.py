"""Howard and Ruder 2018: a hundred labels are enough for a model that has read before."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import ulmfit
from experiments.study import Claim, Study, find, mean_difference
from experiments.ulmfit import PenaltyConfig, ULMFiTTuning
from experiments.ulmfit_tuning import ULMFiTClassification
from lineage_jax.data.labelled import LabelledData, LabelledDataset, load_labelled
from lineage_jax.data.labelled_text import split_labelled
from lineage_jax.data.packing import Batches
from lineage_jax.data.snippets import package_of, snippets
from lineage_jax.data.sources import Corpus
from lineage_jax.data.standard_library import python_text
from lineage_jax.data.text import TextData
from lineage_jax.data.tokenizers import Tokenizer
from lineage_jax.data.tokens import tokenize_cached
from lineage_jax.data.train_tokenizers import train_cached
from lineage_jax.models.ulmfit import ClassifierConfig, ULMFiTConfig
from lineage_jax.train.layerwise import LayerwiseConfig, slanted_triangular
from lineage_jax.train.loop import TrainConfig
from lineage_jax.train.metrics import config_json
from lineage_jax.train.program import Program
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import make_train_step, many_steps
from lineage_jax.typing import Params

STEPS_PER_CALL = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read before any label is seen, and how often.

    The general text is Python's own without the eight packages whose functions are classified; the
    text of the task is those functions, but for the held-out ones.
    """

    model: ULMFiTConfig
    num_documents: int | None = None
    """Of the general text, the first in the order of their names; all, if not given."""
    general: int = 600
    """Updates on general text, by Adam at one rate for all layers."""
    task: int = 120
    """Updates on that of the task, each layer at its rate (section 3.2)."""
    data: LabelledData

    def tokenizer(self) -> Tokenizer:
        """A byte-pair encoding of the general text."""
        return train_cached("bpe", [self.corpus()], self.model.vocab_size, TextData.cache_dir)

    def corpus(self) -> Corpus:
        """The general text."""
        known = [one for one in python_text().documents if package_of(one) is None]
        return Corpus("python without packages", tuple(known[: self.num_documents]))


@functools.cache
def read(reading: Reading) -> Params:
    """The parameters of the language model after both stages, of seed 0."""
    text = TextData(seq_len=70, batch_size=32)
    stages = (
        (reading.corpus(), reading.general, LayerwiseConfig(layer_decay=1.0)),
        (
            split_labelled(snippets(), reading.data.heldout_fraction)[0].corpus,
            reading.task,
            LayerwiseConfig(),
        ),
    )
    params = None
    for corpus, updates, optimizer in stages:
        optimizer = dataclasses.replace(optimizer, learning_rate=0.004)  # section 4.1
        made = ULMFiTTuning(
            data=text,
            model=reading.model,
            penalties=PenaltyConfig(activation=0.0, slowness=0.0),  # nothing is read twice
            optimizer=optimizer,
            train=TrainConfig(num_steps=updates),
        )
        cache = os.path.expanduser(TextData.cache_dir)
        stream = tokenize_cached(corpus, reading.tokenizer(), cache)
        batches = Batches(stream, batch_size=text.batch_size, seq_len=text.seq_len)
        params = trained(
            compiled(made.program()), batches.stack, optimizer, updates, 0, params
        ).params
    assert params is not None
    return params


def trained(
    programs: tuple[Any, Any],
    stack: Callable[[int, int], Any],
    optimizer: LayerwiseConfig,
    updates: int,
    seed: int,
    begin: Params | None,
) -> TrainState:
    """The state after so many updates.

    Args:
      programs: of `compiled`.
      stack: from a step and a count, the batches of that many steps, stacked.
      optimizer: whose schedule ends with the updates.
      updates: how many.
      seed: of the first parameters and of dropout.
      begin: parameters to begin with, in place of those of the same names.
    """
    start, steps = programs
    state = start(jnp.int32(seed))
    if begin is not None:
        known = {name: begin[name] for name in state.params if name in begin}
        state = state.replace(params={**state.params, **known})
    rates = [slanted_triangular(optimizer, step, updates) for step in range(updates)]
    for first in range(0, updates, STEPS_PER_CALL):
        some = np.array(rates[first : first + STEPS_PER_CALL], np.float32)
        state, _ = steps(state, stack(first, len(some)), some)
    return state


def compiled(program: Program) -> tuple[Any, Any]:
    """The state before the first update, from a seed; and some updates of it, on end."""

    @jax.jit
    def start(seed):
        params, extra = nn.meta.unbox(program.init(jax.random.key(seed)))
        return TrainState.create(params, program.tx, extra=extra).replace(seed=seed)

    return start, jax.jit(many_steps(make_train_step(program.loss_fn, program.tx)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelsArm:
    """A classifier of functions by their package; "accuracy" is on held-out ones."""

    name: str
    reading: Reading
    pretrained: bool
    num_train: int
    optimizer: LayerwiseConfig

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return config_json(self)

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`, which also draws the texts that are trained on."""
        data = dataclasses.replace(self.reading.data, num_train=self.num_train, seed=seed)
        texts = load_labelled(data, self.reading.tokenizer())
        optimizer = self.optimizer
        if optimizer.unfreeze_every:  # an epoch in the paper, which of 100 texts is three updates
            optimizer = dataclasses.replace(optimizer, unfreeze_every=updates // 10)
        programs, evaluate = of_labels(
            ULMFiTClassification(
                data=self.reading.data,
                model=ClassifierConfig(**vars(self.reading.model), num_labels=8),
                optimizer=optimizer,
                train=TrainConfig(),
            )
        )
        begin = read(self.reading) if self.pretrained else None
        optimizer = dataclasses.replace(optimizer, learning_rate=learning_rate)
        state = trained(programs, texts.train.stack, optimizer, updates, seed, begin)
        loss, accuracy = evaluated(evaluate, state, texts)
        return {"loss": loss, "accuracy": accuracy}


@functools.cache
def of_labels(experiment: ULMFiTClassification) -> tuple[tuple[Any, Any], Any]:
    """What is compiled to train an arm, and to evaluate it."""
    program = experiment.program()

    @jax.jit
    def evaluate(state, batch):
        metrics = program.eval_loss_fn(state.params, state.extra, batch, jax.random.key(0))[1][1]
        return jnp.stack([*metrics["loss"], *metrics["accuracy"]])

    return compiled(program), evaluate


def evaluated(evaluate: Any, state: TrainState, texts: LabelledDataset) -> tuple[float, float]:
    """Mean loss, in nats, and accuracy on the held-out texts."""
    rows = [evaluate(state, texts.heldout(step)) for step in range(texts.heldout.num_batches)]
    loss, count, right, _ = np.asarray(rows, np.float64).sum(0)
    return float(loss / count), float(right / count)


def claim(study: Study) -> Claim:
    """Howard and Ruder 2018, figure 3 and table 7: a hundred labels after reading, or a thousand.

    Fine-tuning is theirs, with a rate for each layer and gradual unfreezing, or of all layers at
    once and alike.
    """
    study = dataclasses.replace(study, num_seeds=3, num_updates=300, learning_rates=(3e-3, 1e-2))
    reading = Reading(
        model=dataclasses.replace(
            ulmfit.tiny().model, embed_dim=64, hidden_dim=128, vocab_size=2048, max_len=96
        ),
        data=LabelledData(seq_len=96, batch_size=32, heldout_fraction=0.2),
    )
    if study.quick:
        sizes: Any = dict(num_layers=1, embed_dim=8, hidden_dim=8, vocab_size=300)
        model = dataclasses.replace(reading.model, **sizes)
        data = dataclasses.replace(reading.data, seq_len=8)
        reading = Reading(model=model, data=data, num_documents=3, general=1, task=2)
    theirs = LayerwiseConfig(unfreeze_every=1)  # a tenth of the updates for each group
    alike = LayerwiseConfig(layer_decay=1.0)
    arms = [
        LabelsArm(name=name, reading=reading, pretrained=read, num_train=n, optimizer=optimizer)
        for name, read, n, optimizer in (
            ("ulmfit-100", True, 100, theirs),
            ("fine-tuned-100", True, 100, alike),
            ("scratch-1000", False, 1000, alike),
        )
    ]

    def findings(ulmfit, fine_tuned, scratch):
        return [
            find(
                "accuracy, ULMFiT of 100 labels - from scratch of 1000",
                mean_difference,
                ulmfit["accuracy"],
                scratch["accuracy"],
                wanted=(0.0, None),
            ),
            find(
                "accuracy of 100 labels, ULMFiT - all layers at once and alike",
                mean_difference,
                ulmfit["accuracy"],
                fine_tuned["accuracy"],
                wanted=(0.0, None),
            ),
        ]

    return study.claim(
        "label_efficiency",
        arms,
        findings,
        milestone="ulmfit",
        statement="a language model that is tuned in three stages learns of a hundred labels what "
        "takes ten times as many from scratch; layers are best tuned one by one",
        where="Howard and Ruder 2018, section 5, figure 3 and table 7",
        criterion="accuracy of ULMFiT on 100 labels at least that from scratch on 1000, and at "
        "least that of fine-tuning all layers at once at one rate, intervals too",
        setting="functions of eight packages of Python's standard library, labelled by package, "
        "their names hidden; AWD-LSTM of two layers, 128 and 64 wide, byte-pair encoding of 2048 "
        "tokens; read before, once for all seeds: the other packages and the help topics, 600 "
        "updates, then the training functions without their labels, 120; 300 updates on labels in "
        "each arm; the learning rate of each arm is the best of a grid on a seed that is not "
        "counted",
    )
