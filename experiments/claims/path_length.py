"""Vaswani et al. 2017: attention reaches any distance in one step, recurrence does not."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import seq2seq, transformer, translation
from experiments.study import Claim, Recipe, Study, find, train
from experiments.study.translation import OPTIMIZER
from lineage_jax.models.seq2seq import Seq2Seq
from lineage_jax.models.transformer import StackConfig, Transformer
from lineage_jax.train.metrics import config_json

DISTANCES = (16, 32, 64, 128, 256)  # tokens from the pair that is asked for to the question


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupData:
    """Rows that end in a question: which value stood beside this key, so many tokens ago?

    A row is padding, noise, a few pairs among the noise, each one token, and a key. The pair of
    that key is the first, `distance` tokens before the end; the others have other keys.
    """

    num_keys: int = 8
    num_values: int = 8
    num_noise: int = 8
    """Different tokens that mean nothing."""
    num_others: int = 3
    """Pairs that are not asked for, after the one that is."""
    distances: tuple[int, ...] = DISTANCES
    batch_size: int = 32

    @property
    def vocab_size(self) -> int:
        """Pairs, keys, noise, and one token that starts a translation."""
        return self.num_keys * self.num_values + self.num_keys + self.num_noise + 1

    def batch(self, seed: int, step: int, distance: int | None = None) -> dict[str, np.ndarray]:
        """Of one step, a function of seed and step; distances drawn for each row if not given."""
        rng = np.random.default_rng((seed, step))
        rows, length = self.batch_size, max(self.distances) + 1
        first_key = self.num_keys * self.num_values
        drawn = rng.choice(self.distances, rows) if distance is None else np.full(rows, distance)
        source = rng.integers(0, self.num_noise, (rows, length)) + first_key + self.num_keys
        values = rng.integers(0, self.num_values, (rows, 1 + self.num_others))
        for row, far in enumerate(drawn):
            keys = rng.permutation(self.num_keys)[: 1 + self.num_others]
            between = 1 + rng.choice(far - 1, self.num_others, replace=False)  # from the question
            places = length - 1 - np.append(far, between)
            source[row, places] = keys * self.num_values + values[row]
            source[row, -1] = first_key + keys[0]
        return {
            "source": source.astype(np.int32),
            "source_mask": np.arange(length) >= length - 1 - drawn[:, None],
            "tokens": np.full((rows, 1), self.vocab_size - 1, np.int32),
            "mask": np.ones((rows, 1), bool),
            "targets": values[:, :1].astype(np.int32),
        }

    def stack(self, seed: int, first: int, count: int) -> dict[str, np.ndarray]:
        """The batches of several steps on end."""
        batches = [self.batch(seed, step) for step in range(first, first + count)]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupArm:
    """A translator that answers the question; "exact_256" is its accuracy at that distance."""

    name: str
    module: Any
    data: LookupData
    num_heldout: int = 1000
    """Rows at each distance."""

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {
            "model": f"{type(self.module).__name__} {config_json(self.module.config)}",
            "data": config_json(self.data),
            "optimizer": config_json(OPTIMIZER),
            "num_heldout": self.num_heldout,
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`, and measures on rows that no update has seen."""
        recipe = Recipe(
            module=self.module,
            init=translation.init,
            loss_fn=translation.loss_fn,
            optimizer=OPTIMIZER,
        )
        stack = functools.partial(self.data.stack, seed)
        params = train(recipe, stack, seed=seed, peak=learning_rate, updates=updates)
        evaluate, found, losses = heldout_program(self.module), {}, []
        heldout = dataclasses.replace(self.data, batch_size=self.num_heldout)
        for distance in self.data.distances:
            loss, right = evaluate(params, heldout.batch(seed, updates, distance))
            found[f"exact_{distance}"] = float(right)
            losses.append(float(loss))
        return {"loss": float(np.mean(losses)), **found}


@functools.cache
def heldout_program(module: Any) -> Any:
    """Of a batch: the mean loss, nats, and the share of answers that are right."""
    loss_fn = translation.loss_fn(module, train=False)

    @jax.jit
    def evaluate(params, batch):
        _, (_, metrics) = loss_fn(params, {}, batch, jax.random.key(0))
        return [metrics[name][0] / metrics[name][1] for name in ("loss", "accuracy")]

    return evaluate


def claim(study: Study) -> Claim:
    """Vaswani et al. 2017, table 1: a Transformer of one layer against an LSTM of as many weights.

    Both read the question last, and write one word.
    """
    data = LookupData(distances=(4, 8), batch_size=8) if study.quick else LookupData()
    study = dataclasses.replace(study, num_seeds=3, num_updates=800)  # rows of 257 tokens
    sizes: Any = dict(source_vocab_size=data.vocab_size, vocab_size=data.vocab_size)
    side = StackConfig(num_layers=1, num_heads=2, mlp_dim=64)
    attention = Transformer(
        dataclasses.replace(
            transformer.tiny().model,
            encoder=side,
            decoder=side,
            embed_dim=32,
            max_len=512,
            shared_embeddings=True,
            dropout_rate=0.0,  # no row is seen twice
            **sizes,
        )
    )
    c = seq2seq.tiny().model
    recurrence = Seq2Seq(
        dataclasses.replace(
            c,
            num_layers=1,
            embed_dim=32,
            hidden_dim=32,
            init_scale=c.init_scale * math.sqrt(1000 / 32),  # as `study.translation.SPREAD`
            forget_bias=1.0,  # open at the start, so that it can remember at all
            **sizes,
        )
    )
    rows = 50 if study.quick else 1000
    compared = [
        LookupArm(name=name, module=module, data=data, num_heldout=rows)
        for name, module in (("transformer", attention), ("lstm", recurrence))
    ]
    far = f"exact_{max(data.distances)}"

    def findings(attention, recurrence):
        return [
            find(
                "accuracy at the largest distance, Transformer",
                lambda share: share.mean(-1),
                attention[far],
                wanted=(0.95, None),
            ),
            find(
                "accuracy at the largest distance, LSTM",
                lambda share: share.mean(-1),
                recurrence[far],
                wanted=(None, 0.7),
            ),
        ]

    return study.claim(
        "path_length",
        compared,
        findings,
        milestone="transformer",
        statement="distance does not hurt a network in which all positions are one step apart; it "
        "hurts a recurrent one",
        where="Vaswani et al. 2017, section 4, table 1",
        criterion="accuracy at distance 256 at least 0.95 with attention, at most 0.7 with an LSTM "
        "of as many parameters, intervals too",
        setting="eight keys, eight values, one token for each pair; four pairs among noise, of "
        "which the first is asked for, 16 to 256 tokens on; encoder-decoders of one layer, 32 wide "
        "(24,000 parameters), 800 updates of 32 rows; the learning rate of each arm is the best of "
        "a grid on a seed that is not counted",
    )
