"""Sentences and their translations: two files whose lines belong together."""

import os
from typing import NamedTuple

from lineage_jax.data.sources import Corpus, Document, is_held_out, read_text


class ParallelText(NamedTuple):
    """Two corpora of sentences: document i of `target` translates document i of `source`."""

    source: Corpus
    target: Corpus

    @property
    def name(self) -> str:
        return f"{self.source.name} to {self.target.name}"

    def choose(self, places: list[int]) -> "ParallelText":
        """The pairs at these places, in this order."""
        source, target = (
            Corpus(side.name, tuple(side.documents[place] for place in places)) for side in self
        )
        return ParallelText(source, target)


def read_parallel_text(
    source_path: str | os.PathLike, target_path: str | os.PathLike
) -> ParallelText:
    """Reads two UTF-8 text files, gzipped or not, of which line i of one translates line i of
    the other. Lines that are blank in both are left out; `gs://` paths work.

    Raises:
      FileNotFoundError: one of the files is not there.
      ValueError: a file is empty or not UTF-8, a line is blank in one file alone, or the files
        have different numbers of lines; naming file and line.
    """
    source, target = _read_lines(source_path), _read_lines(target_path)
    if len(source) != len(target):
        long, short = (source_path, target_path)[:: 1 if len(source) > len(target) else -1]
        first = min(len(source), len(target)) + 1
        raise ValueError(
            f"{long}:{first}: wanted a line {first} in {short} to go with it, which ends before; "
            f"the lines of the two files are to be pairs, {len(source)} and {len(target)} came"
        )
    for number, lines in enumerate(zip(source, target, strict=True), start=1):
        blank, full = (not line.strip() for line in lines)
        if blank != full:
            paths = (source_path, target_path) if blank else (target_path, source_path)
            raise ValueError(
                f"{paths[0]}:{number}: wanted the translation of line {number} of {paths[1]}, "
                "came a blank line; leave the line out of both files"
            )
    return ParallelText(_sentences(source_path, source), _sentences(target_path, target))


def split_pairs(pairs: ParallelText, heldout_fraction: float) -> tuple[ParallelText, ParallelText]:
    """Splits pairs into (train, held out) by the digest of the source sentence.

    So a pair stays on its side when others are added, and a sentence that comes several times, be
    it with other translations, is wholly trained on or wholly held out.

    Raises:
      ValueError: the fraction is not between 0 and 1, or a side would be empty.
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for place, document in enumerate(pairs.source.documents):
        sides[is_held_out(document.text.encode(), heldout_fraction)].append(place)
    if not all(sides):
        raise ValueError(
            f"{pairs.name}: too few pairs, {len(pairs.source.documents)}, to hold out "
            f"{heldout_fraction:g} of them; give more or another --data.heldout-fraction"
        )
    return pairs.choose(sides[0]), pairs.choose(sides[1])


def _read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a file; those of Windows end in one character more, which is dropped."""
    from etils import epath

    if not epath.Path(path).expanduser().exists():
        raise FileNotFoundError(
            f"{path}: no such file; check the paths (--data.source-path, --data.target-path)"
        )
    documents = read_text(path).documents
    if len(documents) > 1:
        raise ValueError(f"{path}: wanted one text file with a sentence on each line")
    lines = [line.removesuffix("\r") for line in documents[0].text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _sentences(path: str | os.PathLike, lines: list[str]) -> Corpus:
    name = os.path.basename(path)
    full = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return Corpus(name, tuple(Document(f"{name}:{number}", line) for number, line in full))
