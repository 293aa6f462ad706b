"""Texts, or pairs of texts, that each have a label: tables in files."""

import csv
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lineage_jax.data.sources import Corpus, Document, is_held_out, read_file


class Example(NamedTuple):
    """One text or two, their label, and the name that errors and records call them by."""

    name: str
    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class LabelledText:
    """Examples in a fixed order, all of as many texts."""

    name: str
    examples: tuple[Example, ...]

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Every label that an example has, sorted."""
        return tuple(sorted({example.label for example in self.examples}))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of all texts and labels, in order."""
        rows = [[*example.texts, example.label] for example in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def corpus(self) -> Corpus:
        """The texts alone, such as a tokenizer is trained on."""
        return Corpus(
            self.name,
            tuple(
                Document(example.name, text) for example in self.examples for text in example.texts
            ),
        )


def read_labelled(
    path: str | os.PathLike, *, text: str = "text", second: str | None = None, label: str = "label"
) -> LabelledText:
    """Reads a UTF-8 table with a text, perhaps a second one, and a label in each row.

    A `.csv` or `.tsv` begins with the names of its columns; a `.jsonl` has an object on each line.
    Fields of a `.csv` may be quoted; those of a `.tsv` stand as they are, as GLUE's do (Wang et al.
    2018, arXiv 1804.07461). Any may be gzipped (`.gz`). `gs://` paths work.

    Args:
      path: of the file.
      text: the column of the text.
      second: the column of the second text, where there are two.
      label: the column of the label. A number is the label that is written so.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no such table, a field is missing or blank, or all labels are one; naming
        file and line.
    """
    from etils import epath

    file = epath.Path(path).expanduser()
    kinds = {".csv": _table, ".tsv": _table, ".jsonl": _objects}
    kind = os.path.splitext(file.name.removesuffix(".gz"))[1]
    if kind not in kinds:
        raise ValueError(f"{file}: wanted a {', '.join(kinds)} file (or one with .gz)")
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; check the path (--data.path)")
    columns = [text, label] if second is None else [text, second, label]
    content = read_file(file).removeprefix("\ufeff")  # which spreadsheets begin a file with
    examples = []
    for number, row in kinds[kind](content, kind, str(file)):
        *texts, answer = (_field(row, column, f"{file}:{number}") for column in columns)
        examples.append(Example(f"{file.name}:{number}", tuple(texts), answer))
    found = LabelledText(file.name, tuple(examples))
    if len(found.labels) < 2:
        came = f"only {found.labels[0]!r}" if found.labels else "no rows"
        raise ValueError(f"{file}: wanted two labels or more under {label!r}, came {came}")
    return found


def split_labelled(
    text: LabelledText, heldout_fraction: float
) -> tuple[LabelledText, LabelledText]:
    """Splits examples into (train, held out) by the digest of their texts.

    So an example stays on its side when others are added, and texts that come several times, be
    it with other labels, are wholly trained on or wholly held out.

    Raises:
      ValueError: the fraction is not between 0 and 1, or a side would be empty.
    """
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in text.examples:
        content = "\0".join(example.texts).encode()
        sides[is_held_out(content, heldout_fraction)].append(example)
    if not all(sides):
        raise ValueError(
            f"{text.name}: too few examples, {len(text.examples)}, to hold out "
            f"{heldout_fraction:g} of them; give more or another --data.heldout-fraction"
        )
    train, heldout = sides
    return LabelledText(text.name, tuple(train)), LabelledText(text.name, tuple(heldout))


def label_ids(labels: Sequence[str], text: LabelledText) -> list[int]:
    """The place of each example's label among the labels.

    Raises:
      ValueError: a label is none of them, naming its line.
    """
    places = {label: place for place, label in enumerate(labels)}
    for example in text.examples:
        if example.label not in places:
            raise ValueError(
                f"{example.name}: wanted one of the labels that are trained on, "
                f"{', '.join(labels[:10])}, came {example.label!r}"
            )
    return [places[example.label] for example in text.examples]


def _table(content: str, kind: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line and fields of each row, by the names in the first."""
    style: dict[str, Any] = dict(delimiter=",", strict=True)
    if kind == ".tsv":
        style = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
    reader = csv.DictReader(io.StringIO(content, newline=""), **style)
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{where}:{reader.line_num}: wanted {len(reader.fieldnames or ())} fields, as "
                    f"the first line has, came {len(row[None])} more"
                )
            yield reader.line_num, row
    except csv.Error as error:
        line = reader.reader.line_num  # the row did not come
        raise ValueError(f"{where}:{line}: wanted a {kind} table: {error}") from None


def _objects(content: str, kind: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line and object of each line that is not blank."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}:{number}: wanted a JSON object, came: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}:{number}: wanted a JSON object, came {type(row).__name__} ({kind})"
            )
        yield number, row


def _field(row: Mapping[str, Any], column: str, where: str) -> str:
    """What stands under a column: a string that is not blank, or a number as it is written."""
    value = row.get(column)
    if isinstance(value, int):  # true and false, too
        value = json.dumps(value)
    if not isinstance(value, str) or not value.strip():
        came = f"columns {sorted(map(str, row))}" if column not in row else repr(value)
        raise ValueError(
            f"{where}: wanted a text under {column!r} (--data.text-column, --data.second-column, "
            f"--data.label-column), came {came}"
        )
    return value
