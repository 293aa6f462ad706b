"""Documents as one flat stream of token ids, in memory."""

import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Integer

from lineage_jax.data.cache import cached
from lineage_jax.data.sources import Corpus, Document, is_held_out
from lineage_jax.data.tokenizers import Tokenizer

RECORD = np.dtype("<i4")  # an id where its bytes count: in digests and in files
_BATCH = 128  # documents encoded at once: enough for all cores, few enough for memory
_CACHE_FORMAT = "1"  # raise it when what `tokenize` makes of a text changes


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStream:
    """Token ids of all documents, one after another.

    Attributes:
      ids: every id, uint16 where the vocabulary allows and int32 elsewhere.
      starts: where each document begins, increasing from 0.
      num_bytes: UTF-8 bytes of the text behind the ids, for bits per byte; None if not known.
    """

    ids: Integer[np.ndarray, "N"]
    starts: Int[np.ndarray, "documents"]
    num_bytes: int | None = None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of ids and starts, whatever type they are held in."""
        digest = hashlib.sha256(self.starts.astype("<i8").tobytes())
        digest.update(self.ids.astype(RECORD).tobytes())
        return digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: all but the first of each document."""
        return len(self.ids) - len(self.starts)

    @property
    def documents(self) -> list[np.ndarray]:
        """The ids of each document, as views."""
        return np.split(self.ids, self.starts[1:])


def join(pieces: Sequence[np.ndarray], vocab_size: int, num_bytes: int | None) -> TokenStream:
    """Makes a stream of the ids of each document, in the smallest type that holds them."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    ids = np.concatenate([*pieces, np.zeros(0, dtype)], dtype=dtype, casting="unsafe")
    return TokenStream(ids, np.cumsum(sizes) - sizes, num_bytes)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStream:
    """Encodes documents, closing each with the tokenizer's end of text."""
    pieces, num_bytes = [], 0
    end = np.array([tokenizer.end_of_text], np.int32)
    for first in range(0, len(documents), _BATCH):
        texts = [document.text for document in documents[first : first + _BATCH]]
        num_bytes += sum(len(text.encode()) for text in texts)
        pieces += [np.concatenate([ids, end]) for ids in tokenizer.encode_batch(texts)]
    return join(pieces, tokenizer.vocab_size, num_bytes)


def tokenize_cached(
    corpus: Corpus, tokenizer: Tokenizer, cache_dir: str | os.PathLike
) -> TokenStream:
    """`tokenize`, or what it gave for the same text and tokenizer before, from `cache_dir`."""
    from etils import epath

    key = f"{corpus.digest} {tokenizer.digest} {_CACHE_FORMAT}"
    name = f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def build() -> bytes:
        stream, file = tokenize(corpus.documents, tokenizer), io.BytesIO()
        np.savez(file, ids=stream.ids, starts=stream.starts)
        return file.getvalue()

    arrays = np.load(io.BytesIO(cached(epath.Path(cache_dir) / name, build)))
    return TokenStream(arrays["ids"], arrays["starts"], corpus.num_bytes)


def split_tokens(stream: TokenStream, heldout_fraction: float) -> tuple[TokenStream, TokenStream]:
    """Splits a stream into (train, held out) as `split_documents` splits text.

    By document, by the hash of its ids; and where that leaves a side empty, the last
    `heldout_fraction` of the tokens.

    Raises:
      ValueError: the fraction is not between 0 and 1, or a side has nothing to predict.
    """
    ids, starts = stream.ids, stream.starts
    held = np.array(
        [
            is_held_out(document.astype(RECORD).tobytes(), heldout_fraction)
            for document in stream.documents
        ]
    )
    if held.all() or not held.any():
        cut = len(ids) - max(1, round(heldout_fraction * len(ids)))
        after = np.concatenate([[0], starts[starts > cut] - cut])
        train, heldout = TokenStream(ids[:cut], starts[starts < cut]), TokenStream(ids[cut:], after)
    else:
        train, heldout = _chosen(stream, ~held), _chosen(stream, held)
    if not (train.num_targets and heldout.num_targets):
        raise ValueError(
            f"too short to hold out {heldout_fraction:g} of {len(ids)} tokens; give more tokens "
            "or another --data.heldout-fraction"
        )
    return train, heldout


def _chosen(stream: TokenStream, chosen: np.ndarray) -> TokenStream:
    sizes = np.diff(stream.starts, append=len(stream.ids))
    kept = sizes[chosen]
    return TokenStream(stream.ids[np.repeat(chosen, sizes)], np.cumsum(kept) - kept)
