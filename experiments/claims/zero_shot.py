"""Radford et al. 2019: larger language models do more tasks that nobody trained them for."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.few_shot import Model, chosen
from experiments.study import Claim, Study, find, train
from experiments.study.text import OPTIMIZER, heldout_loss, recipe
from lineage_jax.data.demonstrations import among_text, demonstrations
from lineage_jax.data.packing import Batches
from lineage_jax.data.sources import Corpus, split_documents
from lineage_jax.data.standard_library import python_text
from lineage_jax.data.tasks import Example
from lineage_jax.data.tokenizers import ByteTokenizer
from lineage_jax.data.tokens import tokenize
from lineage_jax.models import gpt
from lineage_jax.train.metrics import config_json

WIDTHS = (12, 24, 48, 96)  # of the four sizes; table 2's are 768 to 1600, and deeper too
SEQ_LEN = 96  # bytes; nearly all sentences of tasks are shorter
NUM_CHOICES = 4


def claim(study: Study) -> Claim:
    """Radford et al. 2019, figures 1 and 4: four sizes learn the same text.

    The text tells tasks in passing; a model is asked for cases that it was never told, without an
    example and without training, and chooses among answers.
    """
    study = dataclasses.replace(study, num_seeds=3, num_updates=1000)  # four arms, and slow ones
    widths = WIDTHS[:2] if study.quick else WIDTHS
    compared = [Size(name=f"width-{width}", width=width, quick=study.quick) for width in widths]

    def findings(*sizes):
        return [
            find(
                "least gain of zero-shot accuracy from one size to the next",
                least_step,
                *(size["accuracy"] for size in sizes),
                wanted=(0.0, None),
            ),
            find(
                "least fall of held-out loss from one size to the next, nats per byte",
                least_step,
                *(-size["loss"] for size in sizes),
                wanted=(0.0, None),
            ),
        ]

    return study.claim(
        "zero_shot",
        compared,
        findings,
        milestone="gpt",
        statement="the larger a language model is, the better it does tasks that it was not "
        "trained for, asked without an example",
        where="Radford et al. 2019, figures 1 and 4",
        criterion="zero-shot accuracy rises and held-out loss falls at each step from one size to "
        "the next of four, intervals too",
        setting="1000 updates of 12 x 96 bytes; two layers, 12 to 96 wide; a third prose of the "
        "Python reference, the rest sentences of tasks: numbers in French, sums, words reversed; "
        "600 questions, right if the likeliest per byte of four answers is, about cases that the "
        "text tells nowhere; the learning rate of each arm is the best of a grid on a seed that is "
        "not counted",
    )


def least_step(*arms: np.ndarray) -> np.ndarray:
    """By how much the mean rises from one arm to the next, where it rises least."""
    means = [arm.mean(-1) for arm in arms]
    return np.min([b - a for a, b in itertools.pairwise(means)], axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A GPT-2 of one width. Arms of one seed read the same batches and are asked the same."""

    name: str
    width: int
    quick: bool

    @property
    def module(self) -> gpt.GPT:
        """Weights start at 1 / sqrt(width): at 0.02, meant for 768, so few updates are too few."""
        config = gpt.GPTConfig(
            num_layers=2,
            embed_dim=self.width,
            num_heads=self.width // 12,
            vocab_size=ByteTokenizer.vocab_size,
            max_len=SEQ_LEN,
            init_std=1 / math.sqrt(self.width),
        )
        return gpt.GPT(config)

    @property
    def num_questions(self) -> int:
        return 24 if self.quick else 600

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {
            "model": f"GPT {config_json(self.module.config)}",
            "data": f"{mixed_text(0, self.quick)[0].stream.digest} for seed 0",
            "questions": self.num_questions,
            "optimizer": config_json(OPTIMIZER),
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`; the loss on held-out text, and zero-shot accuracy of each task."""
        batches, heldout = mixed_text(seed, self.quick)
        params = train(
            recipe(self.module), batches.stack, seed=seed, peak=learning_rate, updates=updates
        )
        tokenizer = ByteTokenizer()
        model = Model(
            module=self.module,
            empty_cache=functools.partial(gpt.empty_cache, self.module.config),
            params=params,
            max_len=SEQ_LEN,
            tokenizer=tokenizer,
            first=tokenizer.encode("\n").tolist(),  # as sentences stand in the text
            batch_size=24 if self.quick else 200,
        )
        asked = questions(seed, self.num_questions)
        right = np.array(chosen(model, asked, [one.prompt for one in asked], "tokens"))
        tasks = np.array([one.where for one in asked])
        found = {f"accuracy_{task}": right[tasks == task].mean() for task in np.unique(tasks)}
        loss = heldout_loss(self.module, params, heldout)
        return {"loss": loss, "accuracy": float(right.mean())} | {
            str(name): float(share) for name, share in found.items()
        }


@functools.cache
def mixed_text(seed: int, quick: bool) -> tuple[Batches, Batches]:
    """Paragraphs of Python's reference, each followed by eight sentences of tasks.

    The held-out text has other paragraphs, and cases that are told nowhere else.
    """
    topics = tuple(d for d in python_text().documents if d.name.startswith("topics/"))
    train_side, heldout_side = split_documents(Corpus("topics", topics), 0.1)

    def batches(side, heldout, num, **how):
        read = [p.strip() for document in side.documents for p in document.text.split("\n\n")]
        read = [p for p in read if 40 < len(p) < 300]  # half as much as eight sentences
        told = demonstrations(seed, heldout=heldout)
        text = among_text([read[i % len(read)] for i in range(num)], told, cases_per_paragraph=8)
        stream = tokenize(text, ByteTokenizer())
        return Batches(stream, batch_size=12, seq_len=SEQ_LEN, seed=seed, **how)

    return (
        batches(train_side, False, 40 if quick else 2800),
        batches(heldout_side, True, 4 if quick else 60, shuffle=False),
    )


def questions(seed: int, num: int) -> list[Example]:
    """Cases that are told nowhere, each with three other answers of its task."""
    cases = list(itertools.islice(demonstrations(seed, heldout=True), num))
    rng, asked = np.random.default_rng([seed, num]), []
    for case in cases:
        others = {c.answer for c in cases if c.task == case.task} - {case.answer}
        wrong = rng.choice(sorted(others), NUM_CHOICES - 1, replace=False)
        choices = tuple(f"{answer}." for answer in (case.answer, *wrong))
        asked.append(Example(case.prompt, choices, 0, case.task))
    return asked
