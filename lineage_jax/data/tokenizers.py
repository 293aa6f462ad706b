"""Text to ids and back: the 256 bytes, or byte-level byte-pair encoding."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from lineage_jax.data.cache import write_whole

END_OF_TEXT = "<|endoftext|>"  # GPT-2's spelling, the one that we train with
# What others call it: LLaMA 3; LLaMA, T5 and RoBERTa; Gemma; BERT.
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """Maps text to ids in [0, vocab_size) and back.

    `end_of_text` is the id that closes a document; no text encodes to it, and `decode` leaves it
    out. `digest` tells two tokenizers apart.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def encode(self, text: str) -> Int[np.ndarray, "T"]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Any) -> str: ...
    def save(self, folder: str | os.PathLike) -> None: ...


class ByteTokenizer:
    """Each UTF-8 byte is its own id; 256 ends a document. Any text comes back exactly."""

    vocab_size = 257
    end_of_text = 256
    digest = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        """Bytes that are no UTF-8, as a model may well sample, come out as U+FFFD."""
        ids = np.asarray(ids, np.int64)
        return ids[ids < self.end_of_text].astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `folder/tokenizer.json`, which `load_tokenizer` reads."""
        _save(folder, json.dumps({"model": {"type": "bytes"}}))


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Text is encoded as it stands: no special tokens are added, and one that is spelled out in the
    text is read as its letters.

    Args:
      content: the JSON.
      where: what errors call it.
    """

    def __init__(self, content: str, where: str = "tokenizer.json"):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{where}: wanted a Hugging Face tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as letters
        self.content = content
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1  # ids may have gaps
        ends = [vocabulary[name] for name in _ENDS_OF_TEXT if name in vocabulary]
        if not ends:
            raise ValueError(
                f"{where}: wanted a token that ends a text, one of {', '.join(_ENDS_OF_TEXT)}; "
                f"none is among its {len(vocabulary)} tokens"
            )
        self.end_of_text: int = ends[0]

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes several texts, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Any) -> str:
        ids = [int(i) for i in np.asarray(ids) if i != self.end_of_text]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `folder/tokenizer.json`, which `load_tokenizer` and `transformers` read."""
        _save(folder, self.content)


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Learns a byte-level byte-pair encoding: GPT-2's (Radford et al. 2019, section 2.2).

    All 256 bytes are in the vocabulary, so that no text is unknown and every text comes back
    exactly; id 0 is the end of text. The same texts give the same tokenizer. A short text may
    not have enough pairs to fill the vocabulary: then `vocab_size` of what comes back is smaller.

    Raises:
      ValueError: `vocab_size` is below 257, the bytes and the end of text.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(
            f"wanted a BPE vocabulary of at least 257 (256 bytes and the end of text), came "
            f"{vocab_size}; raise --data.vocab-size or use --data.tokenizer bytes"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # Without it, a byte that the texts do not have would vanish when it is met later.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str())


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a `tokenizer.json`, or the one in a folder: ours, or any of Hugging Face's.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not one, or no token of it ends a text.
    """
    from etils import epath

    place = epath.Path(path).expanduser()
    if place.is_dir():
        place = place / "tokenizer.json"
    if not place.exists():
        raise FileNotFoundError(
            f"{place}: no such tokenizer; wanted bytes, bpe, or the path of a "
            "tokenizer.json (--data.tokenizer)"
        )
    try:
        content = place.read_bytes().decode()
        kind = json.loads(content)["model"]["type"]
    except (ValueError, KeyError, TypeError):  # bad UTF-8 and bad JSON are ValueErrors
        raise ValueError(f"{place}: wanted a Hugging Face tokenizer.json, it is not one") from None
    return ByteTokenizer() if kind == "bytes" else HuggingFaceTokenizer(content, str(place))


def _save(folder: str | os.PathLike, content: str) -> None:
    from etils import epath

    write_whole(epath.Path(folder) / "tokenizer.json", content.encode())
