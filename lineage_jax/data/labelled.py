"""From a few settings to batches of labelled texts: what a classifier is fine-tuned on."""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from lineage_jax.data.labelled_batches import LabelledBatches, Marks, end_of_text_marks
from lineage_jax.data.labelled_text import (
    LabelledText,
    label_ids,
    read_labelled,
    split_labelled,
)
from lineage_jax.data.masking import draw
from lineage_jax.data.snippets import snippets
from lineage_jax.data.sources import Corpus
from lineage_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from lineage_jax.data.tokens import tokenize, tokenize_cached
from lineage_jax.data.train_tokenizers import BPE_VOCAB_SIZE, WORD_VOCAB_SIZE, train_cached

_CHOICE = 3  # what random numbers are for, beside those of `masking`: which to train on


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledData:
    """Which texts to classify, and how they are made batches of."""

    path: str | None = None
    """A .csv, .tsv or .jsonl, or .gz of one, with a text and a label in each row. Without it,
    functions of Python's standard library, labelled by the package that they come from."""
    text_column: str = "text"
    """What the column of the text is called."""
    second_column: str | None = None
    """What the column of a second text is called, where each row has two."""
    label_column: str = "label"
    """What the column of the label is called."""
    heldout_path: str | None = None
    """A file to evaluate on. Without it, a share of the examples is held out."""
    heldout_fraction: float = 0.25
    """The share of examples kept from training, for evaluation: of Python's, some 300."""
    num_train: int | None = None
    """Examples to train on, drawn from those that are not held out; all, if not given."""
    tokenizer: str = "bytes"
    """"bytes"; "bpe" or "words", taken from all training texts; or the path of a tokenizer.json or
    of a SentencePiece .model."""
    vocab_size: int | None = None
    """Tokens to train "bpe" to (8192 if not given), words to take (30,000), or the most that
    another tokenizer may have."""
    seq_len: int = 128
    """T, tokens in a row, the marks around the texts included. Longer texts lose their end."""
    batch_size: int = 32
    """B, rows in a global batch (GPT-1, section 4.1; BERT, section 4.1)."""
    seed: int = 0
    """Of the order in which examples are met, and of which are trained on."""
    cache_dir: str = "~/.cache/lineage_jax"
    """Where trained tokenizers and tokenized text are kept between starts."""

    def __post_init__(self):
        if self.path is None and (self.heldout_path or self.second_column):
            raise ValueError("wanted --data.path, to train on, beside what says more of it")
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"wanted 0 < heldout_fraction < 1, came {self.heldout_fraction}")
        for name, least in (("num_train", 1), ("seq_len", 3), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"wanted {name} >= {least}, came {value}")


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledDataset:
    """What a classifier learns from and is evaluated on.

    Attributes:
      name: of the examples.
      train: the training batches, endless.
      heldout: one pass over the held-out examples, in order.
      heldout_text: those examples as text: row i of the pass is example i.
      labels: what each label is called; `label` in a batch is the place here.
      tokenizer: of the texts; the marks around them are ids besides.
    """

    name: str
    train: LabelledBatches
    heldout: LabelledBatches
    heldout_text: LabelledText
    labels: tuple[str, ...]
    tokenizer: Tokenizer

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the training and the held-out rows and labels."""
        found = hashlib.sha256()
        for side in (self.train, self.heldout):
            found.update(side.stream.digest.encode() + side.labels.astype("<i4").tobytes())
        return found.hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What a run's record says of its data; plain JSON types."""
        return {
            "name": self.name,
            "digest": self.digest,
            "tokenizer_digest": self.tokenizer.digest,
            "vocab_size": self.tokenizer.vocab_size,
            "labels": list(self.labels),
            **{
                name: {
                    "digest": side.stream.digest,
                    "examples": side.num_rows,
                    "cut": side.cut,
                    "tokens": side.stream.num_tokens,
                }
                for name, side in (("train", self.train), ("heldout", self.heldout))
            },
        }


def load_labelled(
    config: LabelledData,
    tokenizer: Tokenizer | None = None,
    marks: Callable[[Tokenizer], Marks] = end_of_text_marks,
) -> LabelledDataset:
    """Reads, splits, tokenizes and batches what `config` names.

    Args:
      config: the settings.
      tokenizer: of a model that was trained before; what the settings name, if not given.
      marks: from the tokenizer, ids around the texts.

    Raises:
      OSError: a file is missing or cannot be read.
      ValueError: a setting, or what a file holds, is not what was wanted.
    """
    train, heldout = _read(config)
    labels = _labels(config, train, heldout)
    tokenizer = tokenizer or _tokenizer(config, train.corpus)
    ids = marks(tokenizer)

    def batches(side: LabelledText, **settings: Any) -> LabelledBatches:
        return LabelledBatches(
            _ids(config, side, tokenizer),
            label_ids(labels, side),
            ids,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            **settings,
        )

    return LabelledDataset(
        name=train.name,
        train=batches(_chosen(config, train), seed=config.seed),
        heldout=batches(heldout, shuffle=False),
        heldout_text=heldout,
        labels=labels,
        tokenizer=tokenizer,
    )


def read_labels(config: LabelledData) -> tuple[str, ...]:
    """What `load_labelled` gives as the labels, without the work of tokenizing.

    Raises:
      OSError, ValueError: as `load_labelled`.
    """
    return _labels(config, *_read(config))


def _read(config: LabelledData) -> tuple[LabelledText, LabelledText]:
    """Examples that may be trained on, and examples that are held out."""
    if config.path is None:
        return split_labelled(snippets(), config.heldout_fraction)
    text, second, label = config.text_column, config.second_column, config.label_column
    whole = read_labelled(config.path, text=text, second=second, label=label)
    if config.heldout_path is None:
        return split_labelled(whole, config.heldout_fraction)
    return whole, read_labelled(config.heldout_path, text=text, second=second, label=label)


def _labels(config: LabelledData, train: LabelledText, heldout: LabelledText) -> tuple[str, ...]:
    """All of one file's; of two files', those that can be learnt."""
    both = train.labels + (heldout.labels if config.heldout_path is None else ())
    return tuple(sorted(set(both)))


def _chosen(config: LabelledData, train: LabelledText) -> LabelledText:
    """As many as are trained on, drawn by the seed; all, in their order, if no number is given."""
    have = len(train.examples)
    if config.num_train is None:
        return train
    if config.num_train > have:
        raise ValueError(
            f"{train.name}: wanted {config.num_train} examples to train on, have {have}; take a "
            "lower --data.num-train or --data.heldout-fraction"
        )
    order = np.argsort(draw(have, config.seed, _CHOICE), kind="stable")[: config.num_train]
    return LabelledText(train.name, tuple(train.examples[place] for place in order))


def _tokenizer(config: LabelledData, train: Corpus) -> Tokenizer:
    if config.tokenizer == "bpe":
        return train_cached("bpe", [train], config.vocab_size or BPE_VOCAB_SIZE, config.cache_dir)
    if config.tokenizer == "words":
        num_words = config.vocab_size or WORD_VOCAB_SIZE
        return train_cached("words", [train], num_words, config.cache_dir)
    tokenizer: Tokenizer = ByteTokenizer()
    if config.tokenizer != "bytes":
        tokenizer = load_tokenizer(config.tokenizer)
    if config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {config.tokenizer!r} has {tokenizer.vocab_size} tokens, more than "
            f"--data.vocab-size {config.vocab_size}; leave that out"
        )
    return tokenizer


def _ids(
    config: LabelledData, side: LabelledText, tokenizer: Tokenizer
) -> list[tuple[np.ndarray, ...]]:
    """The ids of each example's texts."""
    corpus = side.corpus
    if isinstance(tokenizer, ByteTokenizer):  # quicker done than read back
        stream = tokenize(corpus.documents, tokenizer)
    else:
        stream = tokenize_cached(corpus, tokenizer, os.path.expanduser(config.cache_dir))
    texts = iter(ids[:-1] for ids in stream.documents)  # without the end of text
    return [tuple(next(texts) for _ in example.texts) for example in side.examples]
