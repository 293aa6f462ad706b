"""Radford et al. 2018: a model that has learnt to go on with text learns a task from fewer labels,
and does some of it before it has seen any."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import classification, gpt, language
from experiments.study import Claim, Recipe, Study, find, mean_difference, train
from experiments.study.heldout import heldout_means, one_pass
from experiments.study.training import programs
from lineage_jax.data.labelled import LabelledData, LabelledDataset, load_labelled
from lineage_jax.data.packing import Batches
from lineage_jax.data.snippets import package_of
from lineage_jax.data.standard_library import python_text
from lineage_jax.data.tokenizers import ByteTokenizer
from lineage_jax.data.tokens import TokenStream, tokenize
from lineage_jax.models.gpt import GPT, Classifier, GPTConfig
from lineage_jax.objectives.language import target_logits
from lineage_jax.train.metrics import config_json
from lineage_jax.train.optim import OptimizerConfig, learning_rate
from lineage_jax.typing import Params

PRETRAINING = OptimizerConfig(learning_rate=5e-3, warmup_steps=50)
FINE_TUNING = OptimizerConfig(schedule="linear", warmup_steps=10)  # its peak is chosen for each arm
LOOKS = (0, 50, 100, 200, 400, 800, 1600, 2400)  # updates after which endings are scored
TEXT_ROWS, LABELLED_ROWS = 8, 16  # of a batch, in pre-training and in fine-tuning
ENDING = 32  # tokens of an ending; before it stands as much of its snippet as fills a row


def claim(study: Study) -> Claim:
    """Radford et al. 2018, table 5 and figure 2.

    A GPT learns the next byte of Python's standard library, but for the eight packages whose
    functions are then told apart; of those it sees 200 with their labels (`LabelledData`), and is
    measured on the ones that are held out. The other arm begins with fresh weights; head, examples,
    their order, updates and the text's own loss beside the labels' (lambda 0.5) are the same.

    Before any fine-tuning, endings are scored as the paper does for RACE (section 5): of two, the
    model is taken to choose the one to whose tokens it gives the higher mean log-probability after
    the context. The context is how a held-out function begins; one ending is how it goes on, the
    other how one of another package does at that place. Who guesses is right in half.
    """
    study = dataclasses.replace(
        study, num_seeds=3, num_updates=120, learning_rates=(2e-3, 4e-3, 8e-3)
    )
    model = GPTConfig(num_layers=3, embed_dim=64, num_heads=4, vocab_size=257, max_len=128)
    data = LabelledData(
        num_train=200, heldout_fraction=0.6, seq_len=model.max_len, batch_size=LABELLED_ROWS
    )
    looks: tuple[int, ...] = LOOKS
    if study.quick:
        model, looks = dataclasses.replace(model, num_layers=1, embed_dim=32), (0, 1, 2)
        data = dataclasses.replace(data, heldout_fraction=0.1)

    def arm(name, looks):
        return TransferArm(name=name, model=model, data=data, looks=looks)

    def findings(pretrained, scratch):
        scores = (pretrained[f"endings_{updates}"] for updates in looks)
        return [
            find(
                "accuracy, pre-trained - from scratch",
                mean_difference,
                pretrained["accuracy"],
                scratch["accuracy"],
                wanted=(0.05, None),
            ),
            find(
                "rank correlation of updates of pre-training and endings chosen rightly",
                rank_correlation,
                *scores,
                wanted=(0.8, None),
            ),
        ]

    return study.claim(
        "transfer",
        [arm("pretrained", looks), arm("scratch", ())],
        findings,
        milestone="gpt",
        statement="pre-training on text lifts a task that is learnt from few labels, and what the "
        "model can do without any rises with it",
        where="Radford et al. 2018, table 5 and figure 2",
        criterion="accuracy on held-out functions after pre-training 5 points or more above that "
        "from scratch; Spearman's correlation of updates of pre-training and endings chosen "
        "rightly 0.8 or more; the intervals too",
        setting="functions of eight packages of Python's standard library, 200 of them with their "
        "labels; pre-training on all other packages, 2400 batches of 8 rows of 128 bytes; 120 "
        "batches of 16 with labels; three layers of 64, with GPT-2's norms; the learning rate of "
        "each arm is the one of a grid with the fewest errors on a seed that is not counted",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferArm:
    """A classifier that begins with a language model, or anew.

    A seed is that of the examples with labels, of the order in which they are met, of the text's
    and of the first parameters.

    Attributes:
      model: of the language model.
      data: to be fine-tuned on.
      looks: updates of pre-training after which endings are scored; none without pre-training.
    """

    name: str
    model: GPTConfig
    data: LabelledData
    looks: tuple[int, ...]

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {
            "model": config_json(self.model),
            "data": {k: v for k, v in config_json(self.data).items() if k != "cache_dir"},
            "looks": list(self.looks),
            "ending": ENDING,
            "text_rows": TEXT_ROWS,
            "pretraining": config_json(PRETRAINING),
            "fine_tuning": config_json(FINE_TUNING),
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Pre-trains, if it does, and fine-tunes from `seed`, and measures on what is held out.

        Returns:
          loss: the share of held-out functions whose package is told wrongly;
          accuracy: that of the others;
          cross_entropy: of the labels, nats;
          endings_N: the share of endings chosen rightly after N updates of pre-training.
        """
        module = Classifier(gpt.classifier(self.model))
        recipe = Recipe(
            module=module,
            init=classification.init,
            loss_fn=gpt.classification_loss_fn,
            optimizer=FINE_TUNING,
        )
        texts = load_labelled(
            dataclasses.replace(self.data, seed=seed),
            marks=lambda tokenizer: gpt.marks_after(tokenizer.vocab_size),
        )
        params: Params = programs(recipe)[0](jnp.int32(seed))
        found: Mapping[str, float] = {}
        if self.looks:
            learnt, found = pretrained(self.model, self.data, self.looks, seed)
            params = classification.begun(params, {"gpt": learnt})
        # Off their devices and back, or arrays that were put there would be compiled for anew.
        params = jax.device_get(params)
        params = train(
            recipe,
            texts.train.stack,
            seed=seed,
            peak=learning_rate,
            updates=updates,
            params=params,
        )
        return {**measure(module, params, texts), **found}


@functools.cache
def pretrained(
    model: GPTConfig, data: LabelledData, looks: tuple[int, ...], seed: int
) -> tuple[Params, Mapping[str, float]]:
    """A language model of the text around the task, and how it chose endings on the way."""
    recipe = Recipe(
        module=GPT(model),
        init=language.init,
        loss_fn=language.loss_fn,
        optimizer=PRETRAINING,
    )
    batches = Batches(other_text(), batch_size=TEXT_ROWS, seq_len=model.max_len, seed=seed)
    rates = [learning_rate(PRETRAINING, step, looks[-1]) for step in range(looks[-1])]
    init, start, steps = programs(recipe)
    state = start(init(jnp.int32(seed)), None, jnp.int32(seed))
    endings = two_endings(load_labelled(data), model.max_len)
    found = {f"endings_{looks[0]}": chosen_rightly(model, state.params, endings)}
    at_once = min(b - a for a, b in itertools.pairwise(looks))  # one program for all calls
    for before, after in itertools.pairwise(looks):
        for first in range(before, after, at_once):
            some = np.array(rates[first : first + at_once], np.float32)
            state, _ = steps(state, batches.stack(first, at_once), some)
        found[f"endings_{after}"] = chosen_rightly(model, state.params, endings)
    return state.params, found


@functools.cache
def other_text() -> TokenStream:
    """The bytes of Python's text, without the packages that are told apart."""
    documents = [one for one in python_text().documents if package_of(one) is None]
    return tokenize(documents, ByteTokenizer())


def two_endings(texts: LabelledDataset, length: int) -> np.ndarray:
    """Held-out functions that fill a row, [functions, 2, length].

    The first of two rows is the function's own; the other goes on as a function of another package
    does: the one half-way around all of them, which stand package by package. Both begin alike, and
    part `ENDING` tokens before they end.
    """
    examples = texts.heldout_text.examples
    whole = [(texts.tokenizer.encode(one.texts[0]), one.label) for one in examples]
    long = [(ids[:length], label) for ids, label in whole if len(ids) >= length]
    rows = []
    for (own, label), (other, another) in zip(
        long, long[len(long) // 2 :] + long[: len(long) // 2], strict=True
    ):
        assert label != another
        rows.append([own, np.concatenate([own[:-ENDING], other[-ENDING:]])])
    return np.array(rows, np.int32)


@functools.cache
def scores_of_endings(model: GPTConfig) -> Any:
    """Compiled: from parameters and rows, the mean log-probability of the last tokens of each."""

    @jax.jit
    def scores(params, rows):
        logits, _ = GPT(model).apply({"params": params}, rows)
        logits, targets = logits[:, -ENDING - 1 : -1], rows[:, -ENDING:]
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        return (target_logits(logits, targets) - log_sum).mean(-1)

    return scores


def chosen_rightly(model: GPTConfig, params: Params, endings: np.ndarray) -> float:
    """The share of functions whose own ending scores higher."""
    scores = scores_of_endings(model)
    found = [scores(params, endings[:, which]) for which in (0, 1)]
    return float((found[0] > found[1]).mean())


def measure(module: Classifier, params: Params, texts: LabelledDataset) -> dict[str, float]:
    """How a classifier does on what is held out."""
    means = heldout_means(module, gpt.classification_loss_fn, params, one_pass(texts.heldout))
    return {
        "loss": 1 - means["accuracy"],
        "accuracy": means["accuracy"],
        "cross_entropy": means["loss"],
    }


def rank_correlation(*scores: np.ndarray) -> np.ndarray:
    """Spearman's, of scores in turn with their order, the mean over seeds (the last axis).

    Scores that are equal share the mean of their ranks.
    """
    values = np.stack(scores)  # looks, ..., seeds
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    ranks = below + (equal - 1) / 2
    order = np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1)) - (len(values) - 1) / 2
    ranks = ranks - (len(values) - 1) / 2
    sizes = np.sqrt((ranks**2).sum(0) * (order**2).sum(0))
    return ((ranks * order).sum(0) / np.maximum(sizes, 1e-12)).mean(-1)
