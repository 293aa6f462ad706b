"""From a few settings to batches of tokens: text or tokens, tokenizer, split, packing."""

import dataclasses
import hashlib
import os
from typing import Any

from lineage_jax.data.packing import Batches
from lineage_jax.data.sources import (
    Corpus,
    read_huggingface,
    read_text,
    split_documents,
)
from lineage_jax.data.standard_library import python_text
from lineage_jax.data.token_files import is_token_file, read_tokens
from lineage_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from lineage_jax.data.tokens import (
    TokenStream,
    split_tokens,
    tokenize,
    tokenize_cached,
)
from lineage_jax.data.train_tokenizers import BPE_VOCAB_SIZE, train_cached


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData:
    """Which text to learn, and how it is cut into batches."""

    path: str | None = None
    """A text file (.txt, .md, .py, .jsonl, any of them .gz), a folder of them, or token files
    (.array_record, .parquet). Without it, the text that every Python installation carries."""
    huggingface: str | None = None
    """A Hugging Face data set, as NAME or NAME:CONFIG; needs the `hf` extra."""
    split: str = "train"
    """The part of the Hugging Face data set to read."""
    column: str = "text"
    """The field that holds the text, in .jsonl and Hugging Face data."""
    tokenizer: str = "bytes"
    """"bytes", "bpe" (trained on the training text), or the path of a tokenizer.json, such as
    `lineage tokenizer train` writes, or of a SentencePiece .model."""
    vocab_size: int | None = None
    """Tokens to train "bpe" to (8192 if not given), the vocabulary of token files, or the most
    that another tokenizer may have."""
    seq_len: int = 256
    """T, tokens in a row (nanoGPT, config/train_shakespeare_char.py)."""
    batch_size: int = 64
    """B, rows in a global batch (nanoGPT, config/train_shakespeare_char.py)."""
    heldout_fraction: float = 0.05
    """The share of documents kept from training, for evaluation: half a megabyte of Python's."""
    seed: int = 0
    """Of the order in which rows are met."""
    cache_dir: str = "~/.cache/lineage_jax"
    """Where trained tokenizers and tokenized text are kept between starts."""

    def __post_init__(self):
        if self.path is not None and self.huggingface is not None:
            raise ValueError(
                f"wanted --data.path or --data.huggingface, came both: "
                f"{self.path!r} and {self.huggingface!r}"
            )
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"wanted 0 < heldout_fraction < 1, came {self.heldout_fraction}")
        for name, least in (("seq_len", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"wanted {name} >= {least}, came {getattr(self, name)}")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"wanted vocab_size >= 2, came {self.vocab_size}")


@dataclasses.dataclass(frozen=True, eq=False)
class TextDataset:
    """What a run learns from and is evaluated on.

    Attributes:
      name: of the text.
      train: the training batches, endless.
      heldout: one pass over the held-out text, in order.
      tokenizer: None for token files without one.
      vocab_size: ids lie in [0, vocab_size).
    """

    name: str
    train: Batches
    heldout: Batches
    tokenizer: Tokenizer | None
    vocab_size: int

    @property
    def num_train_tokens(self) -> int:
        """Tokens of one epoch, the first of each document included."""
        return self.train.stream.num_tokens

    @property
    def num_heldout_tokens(self) -> int:
        """Tokens of the held-out text, the first of each document included."""
        return self.heldout.stream.num_tokens

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of held-out text per predicted token; None where the text is not known.

        Bits per byte = loss in nats per token / (ln 2 x bytes per token).
        """
        stream = self.heldout.stream
        return None if stream.num_bytes is None else stream.num_bytes / stream.num_targets

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the training and the held-out tokens."""
        streams = self.train.stream, self.heldout.stream
        return hashlib.sha256("".join(stream.digest for stream in streams).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What a run's record says of its data; plain JSON types."""
        sides = {"train": self.train.stream, "heldout": self.heldout.stream}
        return {
            "name": self.name,
            "digest": self.digest,
            "tokenizer_digest": self.tokenizer and self.tokenizer.digest,
            "vocab_size": self.vocab_size,
            "bytes_per_token": self.bytes_per_token,
            **{
                side: {
                    "digest": stream.digest,
                    "documents": len(stream.starts),
                    "tokens": stream.num_tokens,
                    "bytes": stream.num_bytes,
                }
                for side, stream in sides.items()
            },
        }


def load_text(config: TextData) -> TextDataset:
    """Reads, splits, tokenizes and packs what `config` names.

    A BPE is trained on the training side alone. Tokenizer and tokens are kept in `cache_dir`, by
    the digest of their text.

    Raises:
      OSError: a file is missing or cannot be read.
      ValueError: a setting, or what a file holds, is not what was wanted.
    """
    if config.path is not None and _holds_tokens(config.path):
        name, tokenizer, vocab_size, train, heldout = _from_tokens(config, config.path)
    else:
        name, tokenizer, vocab_size, train, heldout = _from_text(config)
    batch_size, seq_len = config.batch_size, config.seq_len
    return TextDataset(
        name=name,
        train=Batches(train, batch_size=batch_size, seq_len=seq_len, seed=config.seed),
        heldout=Batches(heldout, batch_size=batch_size, seq_len=seq_len, shuffle=False),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
    )


_Loaded = tuple[str, Tokenizer | None, int, TokenStream, TokenStream]


def _from_text(config: TextData) -> _Loaded:
    if config.path is not None:
        corpus = read_text(config.path, column=config.column)
    elif config.huggingface is not None:
        corpus = read_huggingface(config.huggingface, split=config.split, column=config.column)
    else:
        corpus = python_text()
    train, heldout = split_documents(corpus, config.heldout_fraction)
    tokenizer = _tokenizer(config, train)

    def stream(side: Corpus) -> TokenStream:
        if isinstance(tokenizer, ByteTokenizer):  # quicker done than read back
            return tokenize(side.documents, tokenizer)
        return tokenize_cached(side, tokenizer, os.path.expanduser(config.cache_dir))

    return corpus.name, tokenizer, tokenizer.vocab_size, stream(train), stream(heldout)


def _from_tokens(config: TextData, path: str) -> _Loaded:
    tokenizer, vocab_size = None, config.vocab_size
    if config.tokenizer not in ("bytes", "bpe"):
        tokenizer = load_tokenizer(config.tokenizer)
        vocab_size = vocab_size or tokenizer.vocab_size
    if vocab_size is None:
        raise ValueError(
            f"{path}: token files do not say how large their vocabulary is; give "
            "--data.vocab-size, or their tokenizer.json as --data.tokenizer"
        )
    train, heldout = split_tokens(read_tokens(path, vocab_size), config.heldout_fraction)
    return os.path.basename(os.path.normpath(path)), tokenizer, vocab_size, train, heldout


def _tokenizer(config: TextData, train: Corpus) -> Tokenizer:
    if config.tokenizer == "bpe":
        vocab_size = config.vocab_size or BPE_VOCAB_SIZE
        return train_cached("bpe", [train], vocab_size, config.cache_dir)
    tokenizer: Tokenizer = ByteTokenizer()
    if config.tokenizer != "bytes":
        tokenizer = load_tokenizer(config.tokenizer)
    if config.vocab_size is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {config.tokenizer!r} has {tokenizer.vocab_size} tokens, more than "
            f"--data.vocab-size {config.vocab_size}; leave that out"
        )
    return tokenizer


def _holds_tokens(path: str) -> bool:
    """Whether the path is a token file, or a folder that has one in it."""
    from etils import epath

    place = epath.Path(path).expanduser()
    files = place.iterdir() if place.is_dir() else [place]
    return any(is_token_file(file.name) for file in files)
