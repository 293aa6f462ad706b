"""An arm of a claim on encoders: trained on masked Python, then asked what it has understood."""

import dataclasses
import functools
import io
import keyword
import tokenize
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import masked
from experiments.masked import MaskingConfig
from experiments.study.training import Recipe, train
from lineage_jax.data.masking import MaskedBatches, SpecialTokens, special_tokens_after
from lineage_jax.data.text import TextData, load_text
from lineage_jax.data.tokenizers import Tokenizer
from lineage_jax.data.tokens import TokenStream, join
from lineage_jax.models.bert import BertConfig, PairClassifier, TokenClassifier
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.objectives.masked import masked_token_loss
from lineage_jax.train.metrics import config_json
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params

OPTIMIZER = OptimizerConfig(warmup_steps=50, weight_decay=0.01)
"""Of every arm (weight decay of Devlin et al. 2018, appendix A.2)."""
TUNING_RATE, TUNING_UPDATES = 1e-3, 100
"""Of every fine-tuning."""
KINDS = ("space", "name", "keyword", "number", "string", "comment", "operator")
"""What a token of Python may be a piece of."""

masked_and_pairs = functools.partial(masked.loss_fn, pairs=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonText:
    """Modules of the standard library, as tokens; those of one seed the same for all arms."""

    num_tokens: int = 1_000_000
    num_heldout: int = 50_000
    vocab_size: int = 512
    """Of the byte-pair encoding; special tokens come after."""
    seq_len: int = 48
    batch_size: int = 32
    cache_dir: str = TextData.cache_dir

    @property
    def special(self) -> SpecialTokens:
        return special_tokens_after(self.vocab_size)

    def tokenizer(self) -> Tokenizer:
        found = self._loaded().tokenizer
        assert found is not None
        return found

    def streams(self, seed: int) -> tuple[TokenStream, TokenStream]:
        """To train on, and held out: documents in an order of the seed, as many as asked for."""
        text, found = self._loaded(), []
        for side, most in ((text.train, self.num_tokens), (text.heldout, self.num_heldout)):
            documents = side.stream.documents
            order = np.random.default_rng(seed).permutation(len(documents))
            sizes = np.cumsum([len(documents[i]) for i in order])
            chosen = order[: max(4, int(np.searchsorted(sizes, most)))]
            found.append(join([documents[i] for i in chosen], self.vocab_size, None))
        return found[0], found[1]

    def batches(self, stream: TokenStream, masking: MaskingConfig, **how: Any) -> MaskedBatches:
        return MaskedBatches(
            stream,
            self.special,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            **dataclasses.asdict(masking),
            **how,
        )

    def _loaded(self) -> Any:
        return load_text(
            TextData(
                tokenizer="bpe",
                vocab_size=self.vocab_size,
                heldout_fraction=0.1,
                cache_dir=self.cache_dir,
            )
        )


def small(**changes: Any) -> BertConfig:
    """An encoder of two layers, 48 wide."""
    settings: Any = dict(num_layers=2, embed_dim=48, num_heads=4, vocab_size=516, max_len=64)
    return BertConfig(**settings | changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderArm:
    """An encoder, and what it learns from.

    Attributes:
      name: of the arm.
      module: the encoder with the heads of its objective; its parameters have "encoder".
      loss_fn: the objective, of the module.
      data: the text.
      masking: what a row holds, and what is left out of it.
      asks: what is measured of it, by name: from the arm, its parameters, its streams and the
        seed, a number.
    """

    name: str
    module: Any
    loss_fn: Callable[..., LossFn]
    data: PythonText
    masking: MaskingConfig
    asks: Mapping[str, Callable[..., float]]

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        encoder = self.module.encoder
        return {
            "model": f"{type(self.module).__name__} {type(encoder).__name__} "
            f"{config_json(encoder.config)}",
            "data": {k: v for k, v in config_json(self.data).items() if k != "cache_dir"},
            "masking": config_json(self.masking),
            "optimizer": config_json(OPTIMIZER),
            "tuning": [TUNING_RATE, TUNING_UPDATES],
            "asks": sorted(self.asks),
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`, and measures."""
        streams = self.data.streams(seed)
        batches = self.data.batches(streams[0], self.masking, seed=seed)
        recipe = Recipe(
            module=self.module, init=masked.init, loss_fn=self.loss_fn, optimizer=OPTIMIZER
        )
        params = train(recipe, stack(batches), seed=seed, peak=learning_rate, updates=updates)
        return {name: ask(self, params, streams, seed) for name, ask in self.asks.items()}


def stack(batches: Callable[[int], Mapping[str, np.ndarray]]) -> Callable[[int, int], Any]:
    """From a first step and a count, the batches of those steps on end."""

    def stacked(first: int, count: int) -> dict[str, np.ndarray]:
        made = [batches(step) for step in range(first, first + count)]
        return {name: np.stack([one[name] for one in made]) for name in made[0]}

    return stacked


def heldout_loss(arm: EncoderArm, params: Params, streams: Any, seed: int) -> float:
    """The objective on the held-out text, nats per predicted token; masks the same for all arms."""
    del seed
    masking = dataclasses.replace(arm.masking, dynamic=False)
    batches = arm.data.batches(streams[1], masking, shuffle=False)
    return mean_metric(arm.module, arm.loss_fn, "loss", params, batches)


def understands_kinds(arm: EncoderArm, params: Params, streams: Any, seed: int) -> float:
    """The share of held-out tokens whose kind it tells, after fine-tuning on a few rows."""
    config = dataclasses.replace(arm.module.encoder.config, num_labels=len(KINDS))
    encoder = type(arm.module.encoder)(config)
    learnt, heldout = (kinds_of(stream, arm.data) for stream in streams)
    return fine_tuned(TokenClassifier(encoder), kinds_loss, params, learnt, heldout, arm.data, seed)


def understands_pairs(kind: Any) -> Callable[..., float]:
    """The share of held-out pairs it tells, after fine-tuning: of parts that follow one another."""

    def ask(arm: EncoderArm, params: Params, streams: Any, seed: int) -> float:
        encoder, masking = arm.module.encoder, MaskingConfig(pairs=kind, dynamic=False)
        learnt, heldout = (
            whole_rows(arm.data.batches(stream, masking, shuffle=False)) for stream in streams
        )
        module = PairClassifier(encoder)
        return fine_tuned(module, pair_loss, params, learnt, heldout, arm.data, seed)

    return ask


def fine_tuned(
    module: Any,
    loss_fn: Callable[..., LossFn],
    pretrained: Params,
    rows: Mapping[str, np.ndarray],
    heldout: Mapping[str, np.ndarray],
    data: PythonText,
    seed: int,
) -> float:
    """Accuracy on the held-out rows of an encoder that goes on learning, under a new head.

    Args:
      module: the encoder under that head.
      loss_fn: its objective.
      pretrained: parameters, of which the encoder's are taken.
      rows: to learn from, as many as `TUNING_UPDATES` batches draw.
      heldout: to measure on.
      data: says how large a batch is.
      seed: of the head, and of the order of the rows.
    """
    recipe = Recipe(module=module, init=masked.init, loss_fn=loss_fn, optimizer=OPTIMIZER)
    fresh = jax.jit(lambda key: nn.meta.unbox(masked.init(module, key)))(jax.random.key(seed))
    params = {**fresh, "encoder": pretrained["encoder"]}

    def batch(step: int) -> dict[str, np.ndarray]:
        count = len(rows["tokens"])
        drawn = np.random.default_rng((seed, step)).integers(0, count, data.batch_size)
        return {name: array[drawn] for name, array in rows.items()}

    found = train(
        recipe, stack(batch), seed=seed, peak=TUNING_RATE, updates=TUNING_UPDATES, params=params
    )
    size = data.batch_size
    parts = [
        {name: array[first : first + size] for name, array in heldout.items()}
        for first in range(0, len(heldout["tokens"]) // size * size, size)
    ]
    return mean_metric(module, loss_fn, "accuracy", found, parts)


def mean_metric(
    module: Any, loss_fn: Callable[..., LossFn], metric: str, params: Params, batches: Any
) -> float:
    """A metric over all batches, each by its count."""
    evaluate = metrics_program(module, loss_fn)
    if isinstance(batches, MaskedBatches):
        batches = map(batches, range(batches.num_batches))
    pairs = [np.asarray(evaluate(params, one)[metric], np.float64) for one in batches]
    total, count = np.sum(pairs, axis=0)
    return float(total / count)


@functools.cache
def metrics_program(module: Any, loss_fn: Callable[..., LossFn]) -> Any:
    """The metrics of a batch, compiled."""
    loss = loss_fn(module, train=False)
    return jax.jit(lambda params, batch: loss(params, {}, batch, jax.random.key(0))[1][1])


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
