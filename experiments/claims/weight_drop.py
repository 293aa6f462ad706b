"""Merity et al. 2017: of all that AWD-LSTM adds to an LSTM, dropped weights matter most."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import language
from experiments.study import Claim, Study, find, mean_difference, ratio_of_means
from experiments.ulmfit import PenaltyConfig, loss_fn
from lineage_jax.data.packing import Batches
from lineage_jax.data.sources import Corpus, split_documents
from lineage_jax.data.standard_library import python_text
from lineage_jax.data.text import TextData
from lineage_jax.data.tokens import tokenize
from lineage_jax.data.train_tokenizers import train_cached
from lineage_jax.models.ulmfit import ULMFiT, ULMFiTConfig
from lineage_jax.train import averaging
from lineage_jax.train.averaging import AveragedSGDConfig
from lineage_jax.train.metrics import config_json
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import make_train_step, many_steps

RATES = tuple(f for f in ULMFiTConfig.__dataclass_fields__ if f.endswith("dropout_rate"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopicsData:
    """The topics of Python's `help()`, in tokens of a byte-pair encoding of them."""

    vocab_size: int = 1024
    seq_len: int = 35
    batch_size: int = 20
    heldout_fraction: float = 0.2
    """Of the topics: 19,000 tokens."""
    num_topics: int = 16
    """To train on, the first in the order of their names: 25,000 tokens."""


@functools.cache
def topics(data: TopicsData) -> tuple[Any, Batches]:
    """From a seed, the batches to train on; and one pass over what is held out."""
    whole = python_text()
    prose = Corpus("topics", tuple(d for d in whole.documents if d.name.startswith("topics/")))
    train, heldout = split_documents(prose, data.heldout_fraction)
    train = Corpus("topics", train.documents[: data.num_topics])
    tokenizer = train_cached("bpe", [train], data.vocab_size, TextData.cache_dir)
    sides = [tokenize(side.documents, tokenizer) for side in (train, heldout)]
    sizes: Any = dict(batch_size=data.batch_size, seq_len=data.seq_len)
    shuffled = functools.partial(Batches, sides[0], **sizes)
    return shuffled, Batches(sides[1], shuffle=False, **sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageArm:
    """An LSTM language model, trained by SGD; "loss" is its lowest of all evaluations."""

    name: str
    model: ULMFiTConfig
    penalties: PenaltyConfig
    averages: bool
    """Whether parameters are averaged once evaluations no longer improve (NT-ASGD)."""
    data: TopicsData

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return config_json(self)

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`, and evaluates as it goes along."""
        train, heldout = topics(self.data)
        batches = train(seed=seed)
        start, steps = start_program(still(self.model)), steps_program(self.model, self.penalties)
        evaluate = heldout_program(still(self.model))
        state, losses = start(jnp.int32(seed)), []
        every = min(batches.num_batches, updates // 2)  # an epoch, as in section 5
        passes = [heldout(step) for step in range(heldout.num_batches)]
        for first in range(0, updates, every):
            rates = np.full(every, learning_rate, np.float32)
            state, _ = steps(state, batches.stack(first, every), rates)
            sums = np.asarray([evaluate(state, batch) for batch in passes], np.float64).sum(0)
            losses.append(float(sums[0] / sums[1]))
            if self.averages:
                state = heed(state, losses[-1])
        return {"loss": min(losses), "perplexity": math.exp(min(losses)), "last": losses[-1]}


@functools.cache
def start_program(model: ULMFiTConfig) -> Any:
    """The state before the first update, from a seed."""

    @jax.jit
    def start(seed):
        params = nn.meta.unbox(language.init(ULMFiT(model), jax.random.key(seed)))
        average = averaging.begin(params, AveragedSGDConfig().patience)
        return TrainState.create(params, averaging.sgd(), extra=average).replace(seed=seed)

    return start


@functools.cache
def steps_program(model: ULMFiTConfig, penalties: PenaltyConfig) -> Any:
    """Some updates of a state, on end."""
    step = make_train_step(
        loss_fn(ULMFiT(model), penalties, train=True),
        averaging.sgd(),
        max_grad_norm=AveragedSGDConfig().max_grad_norm,
        after=averaging.after_step,
    )
    return jax.jit(many_steps(step), donate_argnums=0)


@functools.cache
def heldout_program(model: ULMFiTConfig) -> Any:
    """Of a batch, the sum and the count of the losses of its tokens."""
    objective = loss_fn(ULMFiT(model), train=False)

    @jax.jit
    def evaluate(state, batch):
        params = averaging.in_use(state.params, state.extra)
        return jnp.stack(objective(params, {}, batch, jax.random.key(0))[1][1]["loss"])

    return evaluate


@jax.jit
def heed(state: Any, loss: Any) -> TrainState:
    """Begins to average where algorithm 1 does."""
    average = averaging.after_evaluation(state.params, state.extra, jnp.float32(loss), state.step)
    return state.replace(extra=average)


def still(model: Any, *rates: str) -> ULMFiTConfig:
    """The model without those rates of dropout; without any, if none is named."""
    return dataclasses.replace(model, **dict.fromkeys(rates or RATES, 0.0))


def claim(study: Study) -> Claim:
    """Merity et al. 2017, table 4: AWD-LSTM, and what is lost with each part that is left out.

    Two layers of 64 with half of the paper's rates of dropout, as they have so much less to forget
    with; else the settings of section 5.
    """
    study = dataclasses.replace(study, num_seeds=3, num_updates=17 * 36, learning_rates=(30.0,))
    data, width = TopicsData(), 64
    if study.quick:
        data, width = dataclasses.replace(data, num_topics=2, vocab_size=300), 4
    whole = ULMFiTConfig(
        num_layers=2,
        embed_dim=width,
        hidden_dim=width,
        vocab_size=data.vocab_size,
        max_len=data.seq_len,
    )
    whole = dataclasses.replace(whole, **{rate: getattr(whole, rate) / 2 for rate in RATES})
    penalties, none = PenaltyConfig(), PenaltyConfig(activation=0.0, slowness=0.0)

    def arm(name, model, penalties, averages):
        return LanguageArm(
            name=name,
            model=model,
            penalties=penalties,
            averages=averages,
            data=data,
        )

    arms = [
        arm("awd-lstm", whole, penalties, True),
        arm("lstm", still(whole), none, False),
        arm("without weight drop", still(whole, "weight_dropout_rate"), penalties, True),
        arm("without embedding dropout", still(whole, "embed_dropout_rate"), penalties, True),
        arm("without AR and TAR", whole, none, True),
        arm("without NT-ASGD", whole, penalties, False),
    ]

    def findings(full, plain, weights, *others):
        rest = [one["loss"] for one in others]

        def margin(weights, *rest):
            return weights.mean(-1) - np.max([one.mean(-1) for one in rest], axis=0)

        return [
            find(
                "perplexity, AWD-LSTM / LSTM",
                ratio_of_means,
                full["perplexity"],
                plain["perplexity"],
                wanted=(None, 0.93),
            ),
            find(
                "cross-entropy without weight drop - without the next most useful part, nats",
                margin,
                weights["loss"],
                *rest,
                wanted=(0.0, None),
            ),
            find(
                "cross-entropy without weight drop - with all parts, nats",
                mean_difference,
                weights["loss"],
                full["loss"],
                wanted=(0.0, None),
            ),
        ]

    return study.claim(
        "weight_drop",
        arms,
        findings,
        milestone="ulmfit",
        statement="AWD-LSTM is far better than the LSTM that it regularises, and the weights that "
        "it drops matter most",
        where="Merity et al. 2017, section 6, table 4",
        criterion="held-out perplexity of AWD-LSTM at most 0.93 of the LSTM's, interval too; of "
        "all parts that are left out in turn, weight drop costs most, interval above 0",
        setting="topics of Python's `help()` in byte-pair encoding of 1024 tokens, 25,000 of them "
        "to train on; two layers of 64, half of the paper's rates of dropout; SGD at a rate of 30 "
        "for 17 epochs, held-out loss after each, of which the lowest counts; left out in turn is "
        "what table 4 leaves out, but for fine-tuning, variable lengths, weight decay and an "
        "embedding of full size, which are not here",
    )
