"""Text gathered into documents: files and folders, and Hugging Face data sets.

A corpus is a tuple of named documents and a digest of them, so that a run can state exactly
which text it saw, and a split of it by document that no later document moves.
"""

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and the name that errors and records call it by."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    documents: tuple[Document, ...]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of every document's name and text, in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name, document.text):
                data = part.encode("utf-8", "surrogateescape")  # a file name need not be UTF-8
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    @functools.cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of text."""
        return sum(len(document.text.encode()) for document in self.documents)


def read_text(path: str | os.PathLike, *, column: str = "text") -> Corpus:
    """Reads UTF-8 text: one file, or all of a folder in the order of their names.

    A file is one document; a `.jsonl` is one document a line, the string under `column`. Either
    may be gzipped (`.gz`). A folder is read recursively: its .txt, .md, .py and .jsonl files,
    but none in hidden folders. Blank documents are left out. `gs://` paths work.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: no text in it; or bytes that are not UTF-8, or a line that is not JSON with a
        string under `column`, naming file, line and byte.
    """
    from etils import epath

    root = epath.Path(path).expanduser()
    if root.is_dir():
        found = [folder / name for folder, _, names in root.walk() for name in names]
        files = {file.relative_to(root).as_posix(): file for file in found}
        files = {name: file for name, file in sorted(files.items()) if _is_text(name)}
        if not files:
            raise ValueError(
                f"{root}: wanted a folder with {', '.join(TEXT_SUFFIXES)} files "
                "(or those with .gz), found none"
            )
    elif root.exists():
        files = {root.name: root}
    else:
        raise FileNotFoundError(f"{root}: no such file or folder; check the path (--data.path)")
    documents = tuple(
        document
        for name, file in files.items()
        for document in _read_file(name, file, column)
        if document.text.strip()
    )
    if not documents:
        raise ValueError(f"{root}: wanted text, but it is empty or blank")
    return Corpus(root.name, documents)


def read_huggingface(name: str, *, split: str = "train", column: str = "text") -> Corpus:
    """Reads one text column of a Hugging Face data set; each row is a document.

    `name` is as on the hub, with a configuration after a colon where there are several:
    "roneneldan/TinyStories", "Salesforce/wikitext:wikitext-2-raw-v1".

    Raises:
      ValueError: the `datasets` package is missing, or the data set has no such column.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"reading {name!r} from Hugging Face needs the `datasets` package: "
            "pip install 'lineage-jax[hf]'"
        ) from None
    repository, _, configuration = name.partition(":")
    data = datasets.load_dataset(repository, configuration or None, split=split)
    if column not in data.column_names:
        raise ValueError(
            f"{name}: wanted a column {column!r} (--data.column), it has {data.column_names}"
        )
    rows = enumerate(data[column])
    documents = tuple(Document(f"{name}/{split}/{i}", row) for i, row in rows if row.strip())
    if not documents:
        raise ValueError(f"{name}: wanted text in {split}/{column}, but every row is blank")
    return Corpus(name, documents)


def split_documents(corpus: Corpus, heldout_fraction: float) -> tuple[Corpus, Corpus]:
    """Splits a corpus into (train, held out), by document.

    Each document's own text decides, through its hash: adding documents moves no other, and two
    copies of one text never stand on both sides. The fraction is of documents, in expectation.

    One document, or so few that chance puts all on one side, is split as text files are by
    custom: the last `heldout_fraction` of the characters is held out, from the start of a line.

    Raises:
      ValueError: the fraction is not between 0 and 1, or a side would be empty.
    """
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in corpus.documents:
        sides[is_held_out(document.text.encode(), heldout_fraction)].append(document)
    if not all(sides):
        sides = _split_tail(corpus.documents, heldout_fraction)
    if not all(any(document.text.strip() for document in side) for side in sides):
        raise ValueError(
            f"{corpus.name}: too short to hold out {heldout_fraction:g} of its "
            f"{corpus.num_bytes} bytes; give more text or another --data.heldout-fraction"
        )
    train, heldout = sides
    return Corpus(corpus.name, tuple(train)), Corpus(f"{corpus.name} (held out)", tuple(heldout))


def is_held_out(content: bytes, heldout_fraction: float) -> bool:
    """Whether the hash of a document's content falls in the held-out fraction of all hashes."""
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"wanted 0 < heldout_fraction < 1, came {heldout_fraction}")
    hashed = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    return hashed < heldout_fraction * 2**64


def _split_tail(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Cuts the documents, read as one text, where the last `fraction` of it begins."""
    head, tail = [], []
    total = sum(len(document.text) for document in documents)
    cut = total - max(1, round(fraction * total))
    for document in documents:
        size = len(document.text)
        if cut >= size:
            head.append(document)
        elif cut <= 0:
            tail.append(document)
        else:
            line = document.text.find("\n", cut) + 1
            here = line if 0 < line < size else cut
            head.append(Document(f"{document.name} (first part)", document.text[:here]))
            tail.append(Document(f"{document.name} (last part)", document.text[here:]))
        cut -= size
    return head, tail


def _is_text(name: str) -> bool:
    hidden = any(part.startswith(".") for part in pathlib.PurePosixPath(name).parts)
    return name.removesuffix(".gz").endswith(TEXT_SUFFIXES) and not hidden


def read_file(file: Any) -> str:
    """The UTF-8 text of one file, an `epath.Path`, gzipped if its name ends in `.gz`.

    Raises:
      ValueError: it is not a whole gzip file, or not UTF-8, naming file, line and byte.
    """
    data = file.read_bytes()
    if file.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{file}: wanted a whole gzip file, came: {error}") from None
    return _decode(data, str(file))


def _read_file(name: str, file: Any, column: str) -> Iterator[Document]:
    text = read_file(file)
    if name.removesuffix(".gz").endswith(".jsonl"):
        yield from _read_json_lines(name, text, str(file), column)
    else:
        yield Document(name, text)


def _decode(data: bytes, where: str) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"{where}: wanted UTF-8 text, came binary data (a NUL at byte {nul})")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where}:{line}: wanted UTF-8 text, came byte 0x{data[error.start]:02x} at offset "
            f"{error.start}; convert the file to UTF-8"
        ) from None


def _read_json_lines(name: str, text: str, where: str, column: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}:{number}: wanted a JSON object, came: {error}") from None
        value = row.get(column) if isinstance(row, dict) else None
        if not isinstance(value, str):
            came = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{where}:{number}: wanted a string under {column!r} (--data.column), came {came}"
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise ValueError(f"{where}:{number}: not valid Unicode: {error}") from None
        yield Document(f"{name}:{number}", value)
