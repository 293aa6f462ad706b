"""What an encoder has understood of Python: asked by fine-tuning it on a little task."""

import dataclasses
import functools
import io
import keyword
import tokenize
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import masked
from experiments.masked import MaskingConfig
from experiments.study.encoders import OPTIMIZER, EncoderArm, PythonText
from experiments.study.heldout import heldout_means
from experiments.study.training import Recipe, programs, stack, train
from lineage_jax.data.masking import MaskedBatches, Pairs
from lineage_jax.data.tokens import TokenStream
from lineage_jax.models.bert import PairClassifier, TokenClassifier
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.objectives.masked import masked_token_loss
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params

RATE = 1e-3
"""Of every fine-tuning."""
KINDS = ("space", "name", "keyword", "number", "string", "comment", "operator")
"""What a token of Python may be a piece of."""


def understands_kinds(arm: EncoderArm, params: Params, streams: Any, seed: int) -> float:
    """The share of held-out tokens whose kind it tells, after fine-tuning."""
    config = dataclasses.replace(arm.module.encoder.config, num_labels=len(KINDS))
    module = TokenClassifier(type(arm.module.encoder)(config))
    sides = [kinds_of(stream, arm.data) for stream in streams]
    return fine_tuned(module, kinds_loss, params, sides, arm.data, seed)


def understands_pairs(kind: Pairs, *, frozen: bool = False) -> Callable[..., float]:
    """The share of held-out pairs of that kind that it tells, after fine-tuning.

    Args:
      kind: what the pairs are.
      frozen: whether the encoder stays as it is, and its head alone learns.
    """

    def ask(arm: EncoderArm, params: Params, streams: Any, seed: int) -> float:
        module, masking = PairClassifier(arm.module.encoder), MaskingConfig(pairs=kind)
        sides = [whole_rows(arm.data.batches(stream, masking, shuffle=False)) for stream in streams]
        return fine_tuned(module, pair_loss, params, sides, arm.data, seed, frozen=frozen)

    return ask


def fine_tuned(
    module: Any,
    loss_fn: Callable[..., LossFn],
    pretrained: Params,
    sides: Sequence[Mapping[str, np.ndarray]],
    data: PythonText,
    seed: int,
    *,
    frozen: bool = False,
) -> float:
    """Accuracy on held-out rows of an encoder under a new head.

    Args:
      module: the encoder under that head.
      loss_fn: its objective.
      pretrained: parameters, of which the encoder's are taken.
      sides: rows to learn from, and rows to measure on.
      data: says how many rows and updates.
      seed: of the head, and of the order of the rows.
      frozen: whether the encoder stays as it is.
    """
    rows, heldout = sides
    objective = on_frozen(loss_fn) if frozen else loss_fn
    recipe = Recipe(module=module, init=masked.init, loss_fn=objective, optimizer=OPTIMIZER)
    first = programs(recipe)[0](seed)
    head = {name: value for name, value in first.items() if name != "encoder"}
    encoder = {"encoder": pretrained["encoder"]}

    def batch(step: int) -> dict[str, np.ndarray]:
        count = len(rows["tokens"])
        drawn = np.random.default_rng((seed, step)).integers(0, count, data.batch_size)
        return {name: array[drawn] for name, array in rows.items()}

    found = train(
        recipe,
        stack(batch),
        seed=seed,
        peak=RATE,
        updates=data.tuning_updates,
        params={name: head[name] for name in head if name != "encoder"}
        if frozen
        else head | encoder,
        extra=encoder if frozen else None,
    )
    size = data.batch_size
    parts = [
        {name: array[first : first + size] for name, array in heldout.items()}
        for first in range(0, len(heldout["tokens"]) // size * size, size)
    ]
    return heldout_means(module, loss_fn, {**encoder, **found}, parts)["accuracy"]


@functools.cache
def on_frozen(loss_fn: Callable[..., LossFn]) -> Callable[..., LossFn]:
    """The same objective of parameters of which some are in `extra`."""

    def made(module: Any, *, train: bool) -> LossFn:
        inner = loss_fn(module, train=train)

        def loss(params, extra, batch, rng):
            return inner({**params, **extra}, extra, batch, rng)

        return loss

    return made


def kinds_loss(module: Any, *, train: bool) -> LossFn:
    """Of the kind of every word of a row."""

    def loss(params, extra, batch, rng):
        logits = module.apply(
            {"params": params}, batch["tokens"], mask=batch["mask"], train=train,
            rngs={"dropout": rng},
        )  # fmt: skip
        value, metrics = masked_token_loss(logits, batch["kinds"], batch["counted"])
        return value, (extra, metrics)

    return loss


def pair_loss(module: Any, *, train: bool) -> LossFn:
    """Of whether the parts of a row belong together as they stand."""

    def loss(params, extra, batch, rng):
        logits = module.apply(
            {"params": params}, batch["tokens"], batch["types"], mask=batch["mask"], train=train,
            rngs={"dropout": rng},
        )  # fmt: skip
        ones = jnp.ones((len(logits), 1), bool)
        value, metrics = next_token_loss(logits[:, None], batch["label"][:, None], ones)
        return value, (extra, metrics)

    return loss


def whole_rows(batches: MaskedBatches) -> dict[str, np.ndarray]:
    """All rows of a pass, nothing left out of them."""
    made = [batches(step) for step in range(batches.num_batches)]
    found = {name: np.concatenate([one[name] for one in made]) for name in made[0]}
    real = found["mask"].any(-1)
    found["tokens"] = found["targets"]
    return {name: found[name][real] for name in ("tokens", "types", "mask", "label")}


def kinds_of(stream: TokenStream, data: PythonText) -> dict[str, np.ndarray]:
    """Rows of Python, and the kind of each token: that of its last character."""
    tokenizer, special, rows = data.tokenizer(), data.special, []
    pieces = [tokenizer.decode([i]) for i in range(data.vocab_size)]
    room = data.seq_len - 2
    for ids in stream.documents:
        ids = ids[ids != tokenizer.end_of_text]
        kinds = kinds_of_characters("".join(pieces[i] for i in ids))
        if kinds is None:
            continue
        ends = np.cumsum([len(pieces[i]) for i in ids]) - 1
        for first in range(0, len(ids) - room + 1, room):
            here = slice(first, first + room)
            tokens = np.concatenate([[special.cls], ids[here], [special.sep]])
            rows.append((tokens, np.pad(kinds[ends[here]], 1)))
    tokens, kinds = (np.stack(side).astype(np.int32) for side in zip(*rows, strict=True))
    counted = np.zeros(tokens.shape, bool)
    counted[:, 1:-1] = True
    return {
        "tokens": tokens,
        "mask": np.ones(tokens.shape, bool),
        "kinds": kinds,
        "counted": counted,
    }


def kinds_of_characters(text: str) -> np.ndarray | None:
    """The kind of each character of a module, as places in `KINDS`; None if it is no Python."""
    kinds = np.zeros(len(text), np.int32)
    starts = np.cumsum([0, *(len(line) for line in text.splitlines(keepends=True))])
    names = {
        tokenize.NUMBER: "number",
        tokenize.STRING: "string",
        tokenize.COMMENT: "comment",
        tokenize.OP: "operator",
    }
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                kind = "keyword" if keyword.iskeyword(token.string) else "name"
            elif token.type in names:
                kind = names[token.type]
            else:
                continue
            first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
            kinds[first:last] = KINDS.index(kind)
    except (tokenize.TokenError, SyntaxError):
        return None
    return kinds
