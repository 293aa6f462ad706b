"""Parallel text that needs no download: numbers in words and dates, in dozens of languages."""

import datetime
import hashlib
import os
from collections.abc import Callable
from importlib import metadata
from typing import Literal

import numpy as np

from lineage_jax.data.cache import cached
from lineage_jax.data.parallel_text import ParallelText
from lineage_jax.data.sources import Corpus, Document

Kind = Literal["numbers", "dates", "both"]

# Two centuries: in 8000 dates each year comes some forty times, often enough to be learnt.
FIRST_DAY, LAST_DAY = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
MAX_DIGITS = 18  # the numbers are drawn as 64-bit integers


def draw_pairs(
    *,
    kind: Kind,
    source_language: str,
    target_language: str,
    min_digits: int,
    max_digits: int,
    num_pairs: int,
    seed: int,
    cache_dir: str | os.PathLike,
) -> ParallelText:
    """Numbers in words or dates, said in two languages, kept in `cache_dir` once they are made.

    Pair i is a pure function of (seed, i): more pairs begin with the fewer. A number's digits are
    counted out first, each count alike, and then the number, so that all lengths are equally
    common; short numbers therefore come several times. Numbers are worded by num2words
    ("twelve thousand, three hundred and forty-five") and dates, weekday and all, by the Unicode
    CLDR through Babel ("Sunday, November 22, 2026").

    Args:
      kind: "both" draws one or the other, evenly.
      source_language: as num2words and Babel call it: "en", "fr", "de", "pt_BR", ...
      target_language: likewise.
      min_digits: of a number.
      max_digits: of a number, up to 18.
      num_pairs: how many.
      seed: of the draw.
      cache_dir: where to keep them: num2words makes only some thousands a second.

    Raises:
      ValueError: num2words or Babel does not know a language, or has no words for a number.
    """
    draw = f"{kind} {min_digits} {max_digits} {num_pairs} {seed}"
    versions = " ".join(metadata.version(package) for package in ("num2words", "babel"))

    def side(language: str) -> Corpus:
        say = _speaker(language)  # here, for a cached language is to be known too

        def build() -> bytes:
            drawn = draw_numbers_and_dates(kind, min_digits, max_digits, num_pairs, seed)
            return "\n".join(map(say, drawn)).encode()

        key = hashlib.sha256(f"{language} {draw} {versions}".encode()).hexdigest()[:32]
        path = os.path.join(os.path.expanduser(cache_dir), f"number-words-{key}")
        lines = cached(path, build).decode().split("\n")
        name = f"{kind}.{language}"
        documents = (Document(f"{name}:{i}", line) for i, line in enumerate(lines, start=1))
        return Corpus(name, tuple(documents))

    return ParallelText(side(source_language), side(target_language))


def draw_numbers_and_dates(
    kind: Kind, min_digits: int, max_digits: int, num_pairs: int, seed: int
) -> list[int | datetime.date]:
    """What the pairs say, each three raw draws of Philox, which NumPy promises to keep.

    The key is no epoch's, or the order in which pairs are met would come of the same bits.
    """
    key = np.array([seed, 2**64 - 1], np.uint64)
    bits = np.random.Philox(key=key).random_raw(3 * num_pairs)
    drawn: list[int | datetime.date] = []
    for which, length, value in bits.reshape(num_pairs, 3).tolist():
        if kind == "dates" or (kind == "both" and which % 2):
            days = LAST_DAY.toordinal() - FIRST_DAY.toordinal() + 1
            drawn.append(FIRST_DAY + datetime.timedelta(days=value % days))
        else:
            smallest = 10 ** (min_digits + length % (max_digits - min_digits + 1) - 1)
            drawn.append(smallest + value % (9 * smallest))
    return drawn


def _speaker(language: str) -> Callable[[int | datetime.date], str]:
    """Says a number or a date in a language."""
    from babel import Locale, UnknownLocaleError
    from babel.dates import format_date
    from num2words import CONVERTER_CLASSES, num2words

    try:
        locale = Locale.parse(language)
    except (UnknownLocaleError, ValueError):
        locale = None
    if locale is None or language not in CONVERTER_CLASSES:
        raise ValueError(
            f"wanted a language that num2words and Babel know, such as en, fr, de or pt_BR, came "
            f"{language!r}; num2words has {', '.join(sorted(CONVERTER_CLASSES))}"
        )

    def say(value: int | datetime.date) -> str:
        if isinstance(value, datetime.date):
            return format_date(value, format="full", locale=locale)
        try:
            words = num2words(value, lang=language)
        except (OverflowError, TypeError):  # both are met where a language's words end
            words = ""
        if not words:
            raise ValueError(
                f"num2words has no words for {value} in {language!r}; lower --data.max-digits, or "
                "take another language"
            )
        return words

    return say
