"""Raffel et al. 2019: to fill in what is left out teaches more than to write what comes next."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import t5, translation
from experiments.study import Claim, Recipe, Study, find, mean_difference, ratio_of_means, train
from experiments.study.training import stack
from experiments.study.translation import OPTIMIZER, measure, number_pairs
from lineage_jax.data.number_words import draw_pairs
from lineage_jax.data.pairs import PairsData, load_pairs
from lineage_jax.data.span_corruption import DenoisingBatches, Objective
from lineage_jax.data.tokenizers import Tokenizer
from lineage_jax.data.tokens import TokenStream, tokenize
from lineage_jax.models.t5 import T5
from lineage_jax.train.metrics import config_json

NUM_TOKENS, SENTINELS = 512, 32
TEXT_LEN = 64  # tokens of a text in pre-training


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToTextArm:
    """A T5 that reads text under some objective, and then learns to translate.

    Attributes:
      name: of the arm.
      objective: of pre-training.
      module: the T5.
      data: the pairs that it learns in the end.
      reading: updates of pre-training.
    """

    name: str
    objective: Objective
    module: T5
    data: PairsData
    reading: int

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {
            "model": config_json(self.module.config),
            "data": {k: v for k, v in config_json(self.data).items() if k != "cache_dir"},
            "objective": self.objective,
            "reading": self.reading,
            "text_len": TEXT_LEN,
            "optimizer": config_json(OPTIMIZER),
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Reads, learns pairs at the same peak of the rate, and is measured on held-out ones.

        Returns:
          What `measure` does, and "target_len": tokens of a target in pre-training.
        """
        pairs = load_pairs(dataclasses.replace(self.data, seed=seed))
        end = pairs.target_tokenizer.end_of_text
        text = DenoisingBatches(
            unpaired(self.data, pairs.target_tokenizer, seed),
            objective=self.objective,
            batch_size=self.data.batch_size,
            text_len=TEXT_LEN,
            vocab_size=self.module.config.vocab_size,
            start=end,
            end=end,
            seed=seed,
        )
        recipe = Recipe(
            module=self.module,
            init=translation.init,
            loss_fn=translation.loss_fn,
            optimizer=OPTIMIZER,
        )
        told: Any = dict(seed=seed, peak=learning_rate)
        params = train(recipe, stack(text), updates=self.reading, **told)
        params = train(recipe, pairs.train.stack, updates=updates, params=params, **told)
        lengths = text(0)["mask"].sum(-1)
        return {
            **measure(self.module, params, pairs, forward=True, by_digits=False),
            "target_len": float(lengths.mean()),
        }


def unpaired(data: PairsData, tokenizer: Tokenizer, seed: int) -> TokenStream:
    """Numbers and dates in either language, other ones than the pairs', in an order of the seed."""
    text = draw_pairs(
        kind=data.kind,
        source_language=data.source_language,
        target_language=data.target_language,
        min_digits=data.min_digits,
        max_digits=data.max_digits,
        num_pairs=data.num_pairs,
        seed=1000 + seed,
        cache_dir=data.cache_dir,
    )
    documents = [*text.source.documents, *text.target.documents]
    order = np.random.default_rng(seed).permutation(len(documents))
    return tokenize([documents[i] for i in order], tokenizer)


def claim(study: Study) -> Claim:
    """Raffel et al. 2019, tables 4 and 5: three objectives on the same text, for as many updates.

    Then each model learns the same task from few updates: numbers and dates from English to French,
    text to text.
    """
    study = dataclasses.replace(study, num_seeds=3, num_updates=150)
    pairs = number_pairs(
        quick=study.quick,
        kind="both",
        tokenizer="bpe",
        vocab_size=NUM_TOKENS,
        source_len=40,
        target_len=40,
    )
    model = dataclasses.replace(
        t5.tiny().model,
        embed_dim=64,
        num_heads=4,
        head_dim=16,
        mlp_dim=128,
        vocab_size=NUM_TOKENS + SENTINELS,
    )
    objectives: tuple[Objective, ...] = ("span_corruption", "lm", "reconstruction")
    arms = [
        TextToTextArm(
            name=objective,
            objective=objective,
            module=T5(model),
            data=pairs,
            reading=2 if study.quick else 600,
        )
        for objective in objectives
    ]

    def findings(spans, lm, whole):
        return [
            find(
                "cross-entropy downstream, language model - span corruption, nats per token",
                mean_difference,
                lm["loss"],
                spans["loss"],
                wanted=(0.0, None),
            ),
            find(
                "tokens of a target, span corruption / reconstruction",
                ratio_of_means,
                spans["target_len"],
                whole["target_len"],
                wanted=(None, 0.35),
            ),
        ]

    return study.claim(
        "denoising",
        arms,
        findings,
        milestone="t5",
        statement="to fill in what is left out of a text teaches a task more than to predict what "
        "comes next, and spans make its targets short",
        where="Raffel et al. 2019, sections 3.3.1 and 3.3.4, tables 4 to 7",
        criterion="cross-entropy on the task lower after span corruption than after a language "
        "model's objective, interval above 0; targets at most 0.35 of those of reconstruction",
        setting="numbers and dates in English and French words, byte-pair encoding of 512; T5 of "
        "two layers of 64 on each side; 600 updates on text, then 150 on 8000 pairs; the learning "
        "rate of each arm is the best of a grid on a seed that is not counted",
    )
