"""Text to ids and back: the 256 bytes, or a tokenizer of Hugging Face's or SentencePiece's."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from lineage_jax.data.cache import write_whole

END_OF_TEXT = "<|endoftext|>"  # GPT-2's spelling, the one that we train with
# What others call it: LLaMA 3; LLaMA, T5 and RoBERTa; Gemma; BERT.
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# What a folder's tokenizer is called: Hugging Face's; LLaMA's and T5's, of SentencePiece.
_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")


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
        _save(folder, json.dumps({"model": {"type": "bytes"}}).encode())


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

    def id_of(self, token: str) -> int | None:
        """The id of a token that is spelled so, be it a special one; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def decode(self, ids: Any) -> str:
        ids = [int(i) for i in np.asarray(ids) if i != self.end_of_text]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `folder/tokenizer.json`, which `load_tokenizer` and `transformers` read."""
        _save(folder, self.content.encode())


class SentencePieceTokenizer:
    """A `.model` of SentencePiece (Kudo & Richardson 2018), such as T5's and LLaMA's.

    Args:
      content: the file's bytes.
      where: what errors call it.

    Raises:
      ValueError: the `sentencepiece` package is missing, the bytes are no model, or the model has
        no end of text.
    """

    def __init__(self, content: bytes, where: str = "tokenizer.model"):
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(
                f"{where}: reading a SentencePiece model needs the `sentencepiece` package: "
                "pip install 'lineage-jax[sentencepiece]'"
            ) from None
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError:
            raise ValueError(f"{where}: wanted a SentencePiece model, it is not one") from None
        self.content = content
        self.vocab_size: int = self._model.vocab_size()
        self.end_of_text: int = self._model.eos_id()
        if self.end_of_text < 0:
            raise ValueError(f"{where}: wanted a token that ends a text, it was trained without")

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        return np.asarray(self._model.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, np.int32) for ids in self._model.encode(list(texts))]

    def decode(self, ids: Any) -> str:
        return self._model.decode(np.asarray(ids, np.int64).tolist())  # leaves the end of text out

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `folder/tokenizer.model`, which `load_tokenizer` and `transformers` read."""
        _save(folder, self.content, "tokenizer.model")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer, or the one in a folder: a `tokenizer.json`, ours or any of Hugging
    Face's, or a `.model` of SentencePiece.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not one, no token of it ends a text, or it is SentencePiece's and that
        package is missing.
    """
    from etils import epath

    place = epath.Path(path).expanduser()
    if place.is_dir():
        found = [place / name for name in _FILES if (place / name).exists()]
        place = found[0] if found else place / _FILES[0]
    if not place.exists():
        raise FileNotFoundError(
            f"{place}: no such tokenizer; wanted bytes, bpe, or the path of a tokenizer.json or "
            "of a SentencePiece .model (--data.tokenizer)"
        )
    if place.suffix == ".model":
        return SentencePieceTokenizer(place.read_bytes(), str(place))
    try:
        content = place.read_bytes().decode()
        kind = json.loads(content)["model"]["type"]
    except (ValueError, KeyError, TypeError):  # bad UTF-8 and bad JSON are ValueErrors
        raise ValueError(f"{place}: wanted a Hugging Face tokenizer.json, it is not one") from None
    return ByteTokenizer() if kind == "bytes" else HuggingFaceTokenizer(content, str(place))


def _save(folder: str | os.PathLike, content: bytes, name: str = "tokenizer.json") -> None:
    from etils import epath

    write_whole(epath.Path(folder) / name, content)
