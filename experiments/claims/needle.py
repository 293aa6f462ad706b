"""Yuan et al. 2025: what stands anywhere in a long row is found, though little of it is read."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import language
from experiments.study import Claim, Recipe, Study, find, train
from experiments.study.keys_read import share, three_branches
from experiments.study.long_rows import as_large, native_sparse_model, text
from experiments.study.text import OPTIMIZER
from lineage_jax.data.tokenizers import ByteTokenizer
from lineage_jax.kernels import NSAConfig
from lineage_jax.models import llama
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.train.metrics import config_json
from lineage_jax.typing import Array, Float, Int

SHORT, LONG = 64, 256
"""Rows of the first updates, and of the last quarter. Of long ones alone, 900 taught nothing."""
ROWS = {SHORT: 16, LONG: 8}
NUM_KEYS, NUM_VALUES = 8, 4
KEYS = ByteTokenizer.vocab_size
"""The first of the ids that are not text: keys; what facts say, of a key a value; values."""
SAID = KEYS + NUM_KEYS
VALUES = SAID + NUM_KEYS * NUM_VALUES
VOCAB_SIZE = VALUES + NUM_VALUES
SPARSE = NSAConfig(
    compressed_size=8, stride=8, block_size=8, num_blocks=3, num_first=0, num_local=1, window=8
)


def claim(study: Study) -> Claim:
    """Yuan et al. 2025, figure 5: one fact anywhere in a row of 64k tokens, always found.

    It has the model of the paper; here looking up is what these models are trained for.
    """
    study = dataclasses.replace(study, num_seeds=3, num_updates=2000, learning_rates=(3e-3, 6e-3))
    num_test = 40 if study.quick else 800
    sizes: dict[str, int] = dict(vocab_size=VOCAB_SIZE, width=64)
    sparse = native_sparse_model(SPARSE, LONG, compression_dim=32, **sizes)
    compared = [
        Seeker(name="full", module=llama.Llama(as_large(sparse.config)), num_test=num_test),
        Seeker(name="sparse", module=sparse, num_test=num_test),
    ]

    def findings(full, sparse):
        asking = slice(LONG - NUM_KEYS, None)
        read = share(three_branches(SPARSE, LONG), asking)
        return [
            find(
                "facts that are found, sparse, %",
                lambda found: 100 * found.mean(-1),
                sparse["accuracy"],
                wanted=(95.0, None),
            ),
            find(
                "facts that are found, full, %",
                lambda found: 100 * found.mean(-1),
                full["accuracy"],
                wanted=(95.0, None),
            ),
            find(
                "keys that are read by queries that ask, all branches counted, of those behind",
                lambda part: part.mean(-1),
                np.full(len(study.seeds), read),
                wanted=(None, 0.25),
            ),
        ]

    return study.claim(
        "needle",
        compared,
        findings,
        milestone="native_sparse",
        statement="with native sparse attention a model finds what stands anywhere in a long row",
        where="Yuan et al. 2025, figure 5",
        criterion="at least 95 % of the facts found, the interval too, by the model that reads at "
        "most 25 % of the keys, and by full attention, or the task would say nothing",
        setting=f"rows of {LONG}: bytes of Python's standard library, among them {NUM_KEYS} facts, "
        f"one in each eighth, two symbols each: a key, and one of {NUM_VALUES} things said of it; "
        "then the keys, of which what was said is asked for; trained for this, three quarters of "
        f"the updates on rows of {SHORT}; two layers of 64, two heads that share keys and values; "
        "blocks of 8, each squeezed into one key or read whole, of these the query's own and two "
        "more; a window of 8; full attention's feed-forward layers are wider, so that it has as "
        "many parameters; the learning rate of each arm is the best of a grid on a seed that is "
        "not counted",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeker:
    """A model that reads rows with facts in them, and is asked for each. Seeds have their rows."""

    name: str
    module: Any
    num_test: int
    """Rows."""

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {
            "model": f"{type(self.module).__name__} {config_json(self.module.config)}",
            "data": f"{text(LONG).digest}, facts of {NUM_KEYS} keys and {NUM_VALUES} values",
            "rows": [f"{rows} of {length}" for length, rows in ROWS.items()],
            "test": self.num_test,
            "optimizer": config_json(OPTIMIZER),
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`; the loss, and the share of facts that are found, by their depth."""
        recipe = Recipe(
            module=self.module, init=language.init, loss_fn=asked_loss, optimizer=OPTIMIZER
        )
        ids, heldout = (side.stream.ids for side in (text(LONG).train, text(LONG).heldout))

        def stack(length, first, count):
            steps = range(first, first + count)
            made = [with_facts(ids, seed, step, ROWS[length], length) for step in steps]
            return {name: np.stack([one[name] for one in made]) for name in made[0]}

        params = None
        for length, num in ((SHORT, updates - updates // 4), (LONG, updates // 4)):
            told: dict[str, Any] = dict(seed=seed, peak=learning_rate, updates=num, params=params)
            params = train(recipe, functools.partial(stack, length), **told)
        losses, found = [], np.zeros(NUM_KEYS)
        steps = range(2**31, 2**31 + self.num_test // ROWS[LONG])  # that no training comes to
        for step in steps:
            batch = with_facts(heldout, seed, step, ROWS[LONG], LONG)
            loss, right = program(self.module)(params, batch)
            losses.append(float(loss))
            found += np.bincount(batch["depths"].ravel(), np.asarray(right).ravel())
        found /= ROWS[LONG] * len(steps)
        return {"loss": float(np.mean(losses)), "accuracy": float(found.mean())} | {
            f"accuracy_{depth}": float(part) for depth, part in enumerate(found)
        }


def with_facts(
    ids: Int[np.ndarray, "N"], seed: int, step: int, rows: int, row_length: int
) -> dict[str, Int[np.ndarray, "B T"]]:
    """Rows of text with a fact of each key in them, and then the keys, in an order of their own.

    A fact is the key, and then a symbol that says of this key that it has that value: as in a
    sentence, what is said can be found by its subject or be understood alone.

    Returns:
      "tokens"; "values", the ids of what is asked for by the last tokens, in their order; and
      "depths", in which eighth of the text each of these facts stands.
    """
    rng = np.random.default_rng([seed, step, row_length])
    length = row_length - NUM_KEYS
    starts = rng.integers(len(ids) - length, size=rows)
    tokens = ids[starts[:, None] + np.arange(length)].astype(np.int32)
    part = length // NUM_KEYS
    places = part * np.arange(NUM_KEYS) + rng.integers(part - 1, size=(rows, NUM_KEYS))
    keys = np.tile(np.arange(NUM_KEYS), (rows, 1))
    depths, asked = rng.permuted(keys, axis=1), rng.permuted(keys, axis=1)
    values = rng.integers(NUM_VALUES, size=(rows, NUM_KEYS))  # of each key
    where = np.take_along_axis(places, depths, axis=1)  # of each key
    np.put_along_axis(tokens, where, KEYS + keys, axis=1)
    np.put_along_axis(tokens, where + 1, SAID + NUM_VALUES * keys + values, axis=1)
    return {
        "tokens": np.concatenate([tokens, KEYS + asked], axis=1).astype(np.int32),
        "values": (VALUES + np.take_along_axis(values, asked, axis=1)).astype(np.int32),
        "depths": np.take_along_axis(depths, asked, axis=1).astype(np.int32),
    }


def asked_logits(module, params, tokens: Int[Array, "B T"]) -> Float[Array, "B Q V"]:
    """Of the values that the last tokens of a row ask for."""
    return module.apply({"params": params}, tokens)[0][:, -NUM_KEYS:]


def asked_loss(module, *, train):
    """The cross-entropy of what is asked for; nothing else of a row is learnt."""

    def loss(params, extra, batch, rng):
        logits = asked_logits(module, params, batch["tokens"])
        kept = jnp.ones(batch["values"].shape, bool)
        value, metrics = next_token_loss(logits, batch["values"], kept)
        return value, (extra, metrics)

    return loss


@functools.cache
def program(module: Any) -> Any:
    """Compiled: of a batch, the loss and which answers are right."""

    @jax.jit
    def measure(params, batch):
        loss, _ = asked_loss(module, train=False)(params, {}, batch, None)
        logits = asked_logits(module, params, batch["tokens"])
        return loss, logits.argmax(-1) == batch["values"]

    return measure
