"""From a few settings to batches of pairs: sentences and their translations, padded."""

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np

from lineage_jax.data.number_words import MAX_DIGITS, Kind, draw_pairs
from lineage_jax.data.pair_batches import PairBatches
from lineage_jax.data.parallel_text import ParallelText, read_parallel_text, split_pairs
from lineage_jax.data.sources import Corpus
from lineage_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from lineage_jax.data.tokens import TokenStream, join, tokenize, tokenize_cached
from lineage_jax.data.train_tokenizers import BPE_VOCAB_SIZE, WORD_VOCAB_SIZE, train_cached


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsData:
    """Which pairs to learn, and how they are made batches of."""

    source_path: str | None = None
    """A text file, or .gz of one, with a sentence on each line. Without it and its fellow, numbers
    in words or dates, in two languages."""
    target_path: str | None = None
    """The translations, line by line."""
    heldout_source_path: str | None = None
    """Sentences to evaluate on. Without it and its fellow, a share of the pairs is held out."""
    heldout_target_path: str | None = None
    """Their translations."""
    heldout_fraction: float = 0.05
    """The share of pairs kept from training, for evaluation, as text has it."""
    kind: Kind = "numbers"
    """Without files: "numbers", "dates" or "both"."""
    source_language: str = "en"
    """Without files: the language to translate from, as num2words and Babel call it."""
    target_language: str = "fr"
    """Without files: the language to translate to; Sutskever et al. 2014 and Bahdanau et al. 2014
    both go from English to French."""
    min_digits: int = 3
    """Without files: of the shortest numbers. Below it, most would come many times over."""
    max_digits: int = 9
    """Without files: of the longest numbers, which are some twenty words."""
    num_pairs: int = 8000
    """Without files: pairs to draw, held-out ones among them: seconds of work, once."""
    reverse_source: bool = False
    """Read the source's tokens last to first (Sutskever et al. 2014, section 3.3, where a token is
    a word)."""
    tokenizer: str = "words"
    """"words", a vocabulary of each language, or "bpe", one of both (Vaswani et al. 2017, section
    5.1), taken from the training pairs; "bytes"; or the path of a tokenizer.json or of a
    SentencePiece .model."""
    vocab_size: int | None = None
    """Words to take in each language (30,000 if not given: Bahdanau et al. 2014, section 4.1),
    tokens to train "bpe" to (8192), or the most that another tokenizer may have."""
    source_len: int = 51
    """S, the longest source: 50 words (Bahdanau et al. 2014, section 4.2) and the end symbol."""
    target_len: int = 51
    """T, the longest target, its end symbol included (likewise). Longer pairs are left out."""
    buckets: int = 1
    """Shapes that batches come in: with more, pairs meet others of their length and are padded
    less (Sutskever et al. 2014, section 3.4), and a program is compiled for each."""
    batch_size: int = 128
    """B, pairs in a global batch (Sutskever et al. 2014, section 3.4)."""
    seed: int = 0
    """Of the order in which pairs are met; without files, also of the pairs."""
    cache_dir: str = "~/.cache/lineage_jax"
    """Where what is made of the pairs is kept between starts."""

    def __post_init__(self):
        if (self.source_path is None) != (self.target_path is None):
            raise ValueError("wanted --data.source-path and --data.target-path, came one of them")
        if (self.heldout_source_path is None) != (self.heldout_target_path is None):
            raise ValueError(
                "wanted --data.heldout-source-path and --data.heldout-target-path, came one of them"
            )
        if self.source_path is None and self.heldout_source_path is not None:
            raise ValueError(
                "wanted --data.source-path and --data.target-path, to train on, beside the files "
                "to evaluate on"
            )
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"wanted 0 < heldout_fraction < 1, came {self.heldout_fraction}")
        if not 1 <= self.min_digits <= self.max_digits <= MAX_DIGITS:
            raise ValueError(
                f"wanted 1 <= min_digits <= max_digits <= {MAX_DIGITS}, came {self.min_digits} "
                f"and {self.max_digits}"
            )
        sizes = ("num_pairs", "source_len", "target_len", "buckets", "batch_size")
        for name, least in (*((size, 1) for size in sizes), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"wanted {name} >= {least}, came {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, eq=False)
class PairsDataset:
    """What a run learns from and is evaluated on.

    Attributes:
      name: of the pairs.
      train: the training batches, endless.
      heldout: one pass over the held-out pairs, in order.
      heldout_pairs: those pairs as text, source and target: row i of the pass is pair i.
      source_tokenizer: of the source.
      target_tokenizer: of the target; its end of text is also what the decoder begins with.
    """

    name: str
    train: PairBatches
    heldout: PairBatches
    heldout_pairs: tuple[tuple[str, str], ...]
    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer

    @property
    def source_vocab_size(self) -> int:
        """Ids of `source` lie below it."""
        return self.source_tokenizer.vocab_size

    @property
    def vocab_size(self) -> int:
        """Ids of `tokens` and `targets` lie below it."""
        return self.target_tokenizer.vocab_size

    @property
    def left_out(self) -> int:
        """Pairs, training and held-out ones, that are longer than a row."""
        return self.train.left_out + self.heldout.left_out

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the training and the held-out tokens, both languages."""
        sides = self.train, self.heldout
        digests = [stream.digest for side in sides for stream in (side.source, side.target)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What a run's record says of its data; plain JSON types."""
        return {
            "name": self.name,
            "digest": self.digest,
            "source_tokenizer_digest": self.source_tokenizer.digest,
            "tokenizer_digest": self.target_tokenizer.digest,
            "source_vocab_size": self.source_vocab_size,
            "vocab_size": self.vocab_size,
            **{
                name: {
                    "pairs": side.num_rows,
                    "left_out": side.left_out,
                    "source_tokens": side.source.num_tokens,
                    "tokens": side.target.num_tokens,
                }
                for name, side in (("train", self.train), ("heldout", self.heldout))
            },
        }


def load_pairs(config: PairsData) -> PairsDataset:
    """Reads or draws the pairs that `config` names, splits and tokenizes them, and batches them.

    Vocabularies are taken from the training pairs alone. What is made of the pairs is kept in
    `cache_dir`, by their digest.

    Raises:
      OSError: a file is missing or cannot be read.
      ValueError: a setting, or what a file holds, is not what was wanted.
    """
    train, heldout = _read(config)
    source_tokenizer, target_tokenizer = _tokenizers(config, train)

    def batches(pairs: ParallelText, **settings: Any) -> PairBatches:
        source = _tokenize(config, pairs.source, source_tokenizer)
        return PairBatches(
            reverse(source) if config.reverse_source else source,
            _tokenize(config, pairs.target, target_tokenizer),
            start=target_tokenizer.end_of_text,
            batch_size=config.batch_size,
            source_len=config.source_len,
            target_len=config.target_len,
            **settings,
        )

    evaluation = batches(heldout, shuffle=False)
    evaluated = heldout.choose(evaluation.kept.tolist())
    sides = ([document.text for document in side.documents] for side in evaluated)
    return PairsDataset(
        name=train.name,
        train=batches(train, num_buckets=config.buckets, seed=config.seed),
        heldout=evaluation,
        heldout_pairs=tuple(zip(*sides, strict=True)),
        source_tokenizer=source_tokenizer,
        target_tokenizer=target_tokenizer,
    )


def reverse(stream: TokenStream) -> TokenStream:
    """Each document last token first, but for the end symbol, which stays at the end."""
    documents = [np.append(ids[-2::-1], ids[-1:]) for ids in stream.documents]
    return join(documents, int(stream.ids.max()) + 1, stream.num_bytes)


def _read(config: PairsData) -> tuple[ParallelText, ParallelText]:
    """Pairs to train on, and pairs that are held out."""
    if config.source_path is None or config.target_path is None:
        drawn = draw_pairs(
            kind=config.kind,
            source_language=config.source_language,
            target_language=config.target_language,
            min_digits=config.min_digits,
            max_digits=config.max_digits,
            num_pairs=config.num_pairs,
            seed=config.seed,
            cache_dir=config.cache_dir,
        )
        return split_pairs(drawn, config.heldout_fraction)
    pairs = read_parallel_text(config.source_path, config.target_path)
    if config.heldout_source_path is None or config.heldout_target_path is None:
        return split_pairs(pairs, config.heldout_fraction)
    return pairs, read_parallel_text(config.heldout_source_path, config.heldout_target_path)


def _tokenizers(config: PairsData, train: ParallelText) -> tuple[Tokenizer, Tokenizer]:
    """That of the source and that of the target."""
    if config.tokenizer == "words":
        num_words = config.vocab_size or WORD_VOCAB_SIZE
        source, target = (
            train_cached("words", [side], num_words, config.cache_dir) for side in train
        )
        return source, target
    both: Tokenizer
    if config.tokenizer == "bpe":
        both = train_cached("bpe", train, config.vocab_size or BPE_VOCAB_SIZE, config.cache_dir)
    elif config.tokenizer == "bytes":
        both = ByteTokenizer()
    else:
        both = load_tokenizer(config.tokenizer)
    if config.vocab_size is not None and both.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {config.tokenizer!r} has {both.vocab_size} tokens, more than "
            f"--data.vocab-size {config.vocab_size}; leave that out"
        )
    return both, both


def _tokenize(config: PairsData, side: Corpus, tokenizer: Tokenizer) -> TokenStream:
    if isinstance(tokenizer, ByteTokenizer):  # quicker done than read back
        return tokenize(side.documents, tokenizer)
    return tokenize_cached(side, tokenizer, os.path.expanduser(config.cache_dir))
