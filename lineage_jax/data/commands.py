"""What `lineage tokenizer train` does: from text to a tokenizer.json, and how well it does."""

import dataclasses
from collections.abc import Callable

from lineage_jax.data.cache import write_whole
from lineage_jax.data.sources import read_text, split_documents
from lineage_jax.data.standard_library import python_text
from lineage_jax.data.tokens import tokenize
from lineage_jax.data.train_tokenizers import (
    BPE_VOCAB_SIZE,
    Model,
    add_sentinels,
    train_tokenizer,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Which tokenizer to train, and on what."""

    model: Model = "bpe"
    """Byte-level BPE, as GPT-2's; WordPiece, as BERT's; or Unigram, as T5's."""
    vocab_size: int = BPE_VOCAB_SIZE
    """Tokens, special ones and sentinels among them; a short text may not fill them."""
    path: str | None = None
    """A text file (.txt, .md, .py, .jsonl, any of them .gz) or a folder of them. Without it, the
    text that every Python installation carries."""
    column: str = "text"
    """The field that holds the text, in .jsonl."""
    sentinels: int = 0
    """<extra_id_0>, <extra_id_1>, ... to add for T5's spans (T5 itself has 100)."""
    heldout_fraction: float = 0.05
    """The share of documents that is not trained on, to measure bytes per token, as in a run."""
    out: str = "tokenizer.json"
    """Where to write it: a path that --data.tokenizer reads."""

    def __post_init__(self):
        if not self.out.endswith(".json"):
            raise ValueError(f"wanted --out to end in .json, came {self.out!r}")
        if not 0 <= self.sentinels < self.vocab_size:
            raise ValueError(
                f"wanted 0 <= sentinels < vocab_size, came {self.sentinels} and {self.vocab_size}"
            )


def train_tokenizer_file(options: TokenizerOptions, say: Callable[[str], None]) -> str:
    """Trains and writes a tokenizer; what comes back sums it up in a line.

    Bytes per token are those of held-out text per predicted token, the end of each document
    among them, as in a run's bits per byte.

    Raises:
      OSError: the text cannot be read, or the file not written.
      ValueError: the text is none, or too short, or the vocabulary too small.
    """
    path = options.path
    corpus = python_text() if path is None else read_text(path, column=options.column)
    train, heldout = split_documents(corpus, options.heldout_fraction)
    say(
        f"training {options.model} on {train.num_bytes / 1e6:.1f} MB of {corpus.name}, "
        f"{len(train.documents)} documents"
    )
    texts = (document.text for document in train.documents)
    size = options.vocab_size - options.sentinels
    tokenizer = train_tokenizer(options.model, texts, size, show_progress=True)
    tokenizer = add_sentinels(tokenizer, options.sentinels)
    write_whole(options.out, tokenizer.content.encode())
    stream = tokenize(heldout.documents, tokenizer)
    return (
        f"{options.out}: {options.model}, {tokenizer.vocab_size} tokens; "
        f"{heldout.num_bytes / stream.num_targets:.3f} bytes per token on "
        f"{heldout.num_bytes / 1e6:.1f} MB of held-out text"
    )
