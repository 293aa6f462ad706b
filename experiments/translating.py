"""Sentences translated, or any text made into another, by beam search."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

from experiments import translation
from experiments.saved import Saved, open_model
from experiments.speaking import (
    SOURCE_TOKENIZER,
    TRANSLATORS,
    config_and_params,
    laid_out,
    tokenizers_of,
)
from lineage_jax.data.pairs import PairsData
from lineage_jax.data.tokenizers import Tokenizer, load_tokenizer
from lineage_jax.pretrained import Pretrained
from lineage_jax.sampling.beam import batch_axes, beam_search
from lineage_jax.typing import Params

TEXT_LEN = 512
"""Tokens of a text and of what is made of it, where a model sets no limit: T5's (Raffel et al.
2019, section 3.1.1)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslateOptions:
    """How sentences are translated."""

    text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A sentence, or several; lines of standard input if not given."""
    num_beams: int = 4
    """Translations kept at each token (Vaswani et al. 2017, section 6.1); 1 keeps the likeliest."""
    alpha: float = 0.6
    """Of the penalty on short translations (Vaswani et al. 2017, section 6.1)."""
    batch_size: int = 32
    """Sentences at a time."""

    def __post_init__(self):
        for name in ("num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, eq=False)
class Translator:
    """A model that was opened, and how it is spoken to.

    Attributes:
      module: with the Transformer's calls (`experiments.translation`).
      params: of the module.
      source_tokenizer, tokenizer: of what it reads, and of what it writes.
      source_len, target_len: the longest of either, in tokens.
      start: the id that a translation begins with.
      reverse: whether it reads the source last to first.
    """

    module: nn.Module
    params: Params
    source_tokenizer: Tokenizer
    tokenizer: Tokenizer
    source_len: int
    target_len: int
    start: int
    reverse: bool = False

    @classmethod
    def of(cls, folder: str, opened: Saved | Pretrained) -> "Translator":
        """That of a run, or of a Hugging Face folder with a tokenizer.

        Raises:
          OSError, ValueError: if it is none.
        """
        config, params = config_and_params(opened)
        if type(config) not in TRANSLATORS:
            raise ValueError(f"{folder}: wanted a translator, got {type(config).__name__}")
        made: dict[str, Any] = dict(module=TRANSLATORS[type(config)](config), params=params)
        if isinstance(opened, Pretrained):
            reads, writes = pathlib.Path(folder) / SOURCE_TOKENIZER, load_tokenizer(folder)
            length = getattr(config, "max_len", TEXT_LEN)
            start = opened.theirs["decoder_start_token_id"]
            return cls(
                **made,
                source_tokenizer=load_tokenizer(reads) if reads.exists() else writes,
                tokenizer=writes,
                source_len=length,
                target_len=length,
                start=start,
            )
        data, tokenizers = opened.experiment.data, tokenizers_of(opened)
        if isinstance(data, PairsData):
            made |= dict(source_len=data.source_len, target_len=data.target_len)
            made |= dict(reverse=data.reverse_source)
        else:
            made |= dict(source_len=data.seq_len, target_len=data.seq_len)
        return cls(
            **made,
            source_tokenizer=tokenizers[0],
            tokenizer=tokenizers[-1],
            start=tokenizers[-1].end_of_text,
        )

    def source(self, text: str) -> np.ndarray:
        """The ids that are read of a text."""
        return np.append(self.source_tokenizer.encode(text), self.source_tokenizer.end_of_text)

    def written(
        self, rows: Sequence[np.ndarray], options: TranslateOptions
    ) -> Iterator[np.ndarray]:
        """The likeliest ids that beam search finds for each source, up to the end symbol.

        Raises:
          ValueError: if a source is too long for the model.
        """
        module, end, length = self.module, self.tokenizer.end_of_text, self.target_len

        @jax.jit
        def search(params, source, mask):
            variables = {"params": params}

            def begin(rows):
                shape = rows, self.source_len
                ids, real = jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
                return module.apply(variables, ids, real, length, method="start")

            def decoder(tokens, positions, cache, mask=None):
                return module.apply(variables, tokens, positions, cache, mask, method="decode")

            cache = module.apply(variables, source, mask, length, method="start")
            starts = jnp.full(source.shape[0], self.start, jnp.int32)
            found, _ = beam_search(
                decoder, cache, batch_axes(begin), starts, length - 1, end,
                num_beams=options.num_beams, alpha=options.alpha,
            )  # fmt: skip
            return found[:, 0]

        params = laid_out(self.params)
        for first in range(0, len(rows), options.batch_size):
            some = rows[first : first + options.batch_size]
            source, mask = padded(some, options.batch_size, self.source_len, self.reverse)
            found = np.asarray(search(params, jnp.asarray(source), jnp.asarray(mask)))
            for ids in found[: len(some)]:
                yield translation.until(ids, end)


def translate_lines(
    folder: str, sentences: Sequence[str], options: TranslateOptions
) -> Iterator[str]:
    """The likeliest translation of each sentence that beam search finds.

    Args:
      folder: a run of a translator, or a Hugging Face folder of one with a tokenizer.
      sentences: to be translated.
      options: see there.

    Raises:
      OSError, ValueError: if the folder is neither, or a sentence is too long for the model.
    """
    translator = Translator.of(folder, open_model(folder))
    rows = [translator.source(sentence) for sentence in sentences]
    for ids in translator.written(rows, options):
        yield translator.tokenizer.decode(ids)


def padded(
    rows: Sequence[np.ndarray], count: int, length: int, reverse: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences, each closed with its end, as a batch of `count` rows and its mask.

    Raises:
      ValueError: if one is longer than `length`.
    """
    source, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    mask[len(rows) :, 0] = True  # a row of padding alone would average over nothing
    for i, ids in enumerate(rows):
        if len(ids) > length:
            raise ValueError(f"sentence {i + 1} has {len(ids)} tokens, more than the {length} read")
        ids = np.append(ids[-2::-1], ids[-1:]) if reverse else ids
        source[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return source, mask
