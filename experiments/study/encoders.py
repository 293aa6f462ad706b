"""An arm of a claim on encoders: trained on masked Python, then asked what it has understood."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import masked
from experiments.masked import MaskingConfig
from experiments.study.heldout import heldout_means, one_pass
from experiments.study.study import Study
from experiments.study.training import Recipe, stack, train
from lineage_jax.data.masking import MaskedBatches, SpecialTokens, special_tokens_after
from lineage_jax.data.text import TextData, load_text
from lineage_jax.data.tokenizers import Tokenizer
from lineage_jax.data.tokens import TokenStream, join
from lineage_jax.models.bert import BertConfig
from lineage_jax.train.metrics import config_json
from lineage_jax.train.optim import OptimizerConfig
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params

OPTIMIZER = OptimizerConfig(warmup_steps=50, weight_decay=0.01)
"""Of every arm (weight decay of Devlin et al. 2018, appendix A.2)."""
UPDATES = 3000
"""Of every arm: before some 2000 small ones an encoder predicts from word frequencies alone."""

masked_and_pairs = functools.partial(masked.loss_fn, pairs=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonText:
    """Modules of the standard library, as tokens; those of one seed the same for all arms."""

    num_tokens: int = 1_000_000
    num_heldout: int = 50_000
    document_tokens: int | None = None
    """Of each document at most; all if not given."""
    tuning_updates: int = 200
    """Of each fine-tuning, on the same text."""
    vocab_size: int = 384
    """Of the byte-pair encoding; special tokens come after."""
    seq_len: int = 48
    batch_size: int = 16
    cache_dir: str = TextData.cache_dir

    @classmethod
    def of(cls, study: Study, **changes: Any) -> "PythonText":
        """That of a claim: a little of it in the quick form."""
        few: dict[str, Any] = {}
        if study.quick:
            few = dict(num_tokens=5_000, num_heldout=1_000, document_tokens=500, tuning_updates=2)
        return cls(**few | changes)

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
            documents = [x[: self.document_tokens] for x in side.stream.documents]
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

    @functools.cache  # noqa: B019 - few texts, and all arms read them
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
    """An encoder of two layers, 48 wide, whose sums start like those of BERT's 768 units."""
    settings: Any = dict(
        num_layers=2,
        embed_dim=48,
        num_heads=4,
        vocab_size=PythonText().special.vocab_size,
        max_len=64,
        init_std=0.02 * math.sqrt(768 / 48),
    )
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


def heldout_loss(arm: EncoderArm, params: Params, streams: Any, seed: int) -> float:
    """The objective on the held-out text, nats per predicted token; masks the same for all arms."""
    del seed
    masking = dataclasses.replace(arm.masking, dynamic=False)
    batches = arm.data.batches(streams[1], masking, shuffle=False)
    return heldout_means(arm.module, arm.loss_fn, params, one_pass(batches))["loss"]
