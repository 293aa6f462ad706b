"""An arm of a claim on translation: a model and its pairs, trained and measured for a seed."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import translation
from experiments.study.number_words import num_digits, parts
from experiments.study.training import Recipe, train
from lineage_jax.data.pairs import PairsData, PairsDataset, load_pairs
from lineage_jax.data.tokenizers import Tokenizer
from lineage_jax.train.metrics import config_json
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.typing import Params

OPTIMIZER = OptimizerConfig(warmup_steps=50, weight_decay=0.0)
"""Of every arm: Adam with a cosine; the learning rate is chosen for each arm."""
SPREAD = math.sqrt(1000 / 96)
"""By how much more the weights of 96 units start than those of the papers' 1000 units: then sums
over units start alike. With the papers' own, 400 updates are too few (`experiments/LOG.md`)."""


def number_pairs(*, quick: bool = False, **changes: Any) -> PairsData:
    """Numbers of 3 to 9 digits in English and French words; 8000 to train on, 1000 held out.

    The longest have 20 and 21 words, end symbols included: none is left out.
    """
    pairs = PairsData(
        num_pairs=9000,
        heldout_fraction=1 / 9,
        min_digits=3,
        max_digits=9,
        source_len=20,
        target_len=21,
        batch_size=64,
    )
    if quick:
        pairs = dataclasses.replace(pairs, num_pairs=300, batch_size=16)
    return dataclasses.replace(pairs, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationArm:
    """A translator that learns some pairs.

    A seed is that of the pairs, of the order in which they are met and of the first parameters:
    arms of one seed see the same batches.
    """

    name: str
    module: Any
    data: PairsData

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {
            "model": f"{type(self.module).__name__} {config_json(self.module.config)}",
            "data": {k: v for k, v in config_json(self.data).items() if k != "cache_dir"},
            "optimizer": config_json(OPTIMIZER),
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`, and measures on the held-out pairs."""
        pairs = load_pairs(dataclasses.replace(self.data, seed=seed))
        recipe = Recipe(
            module=self.module,
            init=translation.init,
            loss_fn=translation.loss_fn,
            optimizer=OPTIMIZER,
        )
        stack = pairs.train.stack
        params = train(recipe, stack, seed=seed, peak=learning_rate, updates=updates)
        return measure(self.module, params, pairs, forward=not self.data.reverse_source)


@functools.cache
def heldout_program(module: Any, start: int, length: int) -> Any:
    """Of a batch: the objective, which rows are translated exactly, and where attention is."""
    loss_fn = translation.loss_fn(module, train=False)

    @jax.jit
    def evaluate(params, batch):
        _, (_, metrics) = loss_fn(params, {}, batch, jax.random.key(0))
        written = translation.translate(
            module, params, batch["source"], batch["source_mask"], start, length
        )
        same = (written == batch["targets"]) | ~batch["mask"]  # up to the end symbol
        inputs = [batch[name] for name in ("source", "tokens", "source_mask", "mask")]
        _, sown = module.apply({"params": params}, *inputs, mutable=["intermediates"])
        weights = sown.get("intermediates", {}).get("alignment")
        looked = None if weights is None else weights[0].argmax(-1)  # B T
        return metrics["loss"], same.all(-1), looked

    return evaluate


def measure(
    module: Any, params: Params, pairs: PairsDataset, forward: bool, by_digits: bool = True
) -> dict[str, float]:
    """What the held-out pairs say of a translator.

    Args:
      module: the model.
      params: its parameters.
      pairs: of which the held-out ones are taken.
      forward: whether the source is read first word first.
      by_digits: whether they are numbers, to be told apart by their digits.

    Returns:
      loss: cross-entropy, nats per word of the target;
      exact: the share of numbers translated without a mistake, by greedy search;
      exact_3 ... exact_9: that of numbers of so many digits;
      aligned: the share of steps at which attention is where it should be (`aligned`), if there is
        any and the source is read forwards.
    """
    heldout, tokenizer = pairs.heldout, pairs.target_tokenizer
    evaluate = heldout_program(module, tokenizer.end_of_text, heldout.lengths[-1][1].item())
    total, count, exact, hits = 0.0, 0.0, [], []
    for step in range(heldout.num_batches):
        batch = heldout(step)
        loss, same, looked = evaluate(params, batch)
        total, count = total + float(loss[0]), count + float(loss[1])
        rows = np.flatnonzero(batch["mask"].any(-1))  # the last batch is filled up
        exact += np.asarray(same)[rows].tolist()
        if looked is None or not forward:
            continue
        for row in rows:
            source = words(pairs.source_tokenizer, batch["source"][row][batch["source_mask"][row]])
            target = words(tokenizer, batch["targets"][row][batch["mask"][row]])
            hits += aligned(source, target, np.asarray(looked)[row])
    found = {"loss": total / count, "exact": float(np.mean(exact))}
    if by_digits:
        digits = np.array([num_digits(source) for source, _ in pairs.heldout_pairs])
        for length in np.unique(digits).tolist():
            found[f"exact_{length}"] = float(np.mean(np.array(exact)[digits == length]))
    return {**found, "aligned": float(np.mean(hits))} if hits else found


def words(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """The word of each id."""
    return [tokenizer.decode([i]) for i in ids.tolist()]


def aligned(source: list[str], target: list[str], looked: np.ndarray) -> list[bool]:
    """For each step that writes a word of the number, whether attention is where it should be.

    The true source words of a French word are the English ones that say the same part of the number
    (`parts`): two where "soixante-douze" splits seventy-two otherwise. Steps that write "et" or the
    end symbol have none, and are not counted. "Where it should be" is on a true word or beside it.

    Args:
      source: the words that the encoder read, first word first.
      target: the words that were to be written.
      looked: the place in the source of the largest weight, for each step.
    """
    places, hits = parts(source), []
    for step, said in enumerate(parts(target)):
        true = [place for place, parts_there in enumerate(places) if parts_there & said]
        if true:
            hits.append(min(abs(place - int(looked[step])) for place in true) <= 1)
    return hits
