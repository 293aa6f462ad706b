"""Numbers and dates say in one language what they say in the other, the same each time."""

import datetime

import numpy as np
import pytest
from num2words import num2words

from lineage_jax.data.number_words import (
    FIRST_DAY,
    LAST_DAY,
    draw_numbers_and_dates,
    draw_pairs,
)


@pytest.fixture
def made(tmp_path):
    """Draws pairs; other settings than these are given by name."""

    def make(**settings):
        defaults = {
            "kind": "numbers", "source_language": "en", "target_language": "fr", "min_digits": 3,
            "max_digits": 9, "num_pairs": 40, "seed": 0, "cache_dir": tmp_path,
        }  # fmt: skip
        pairs = draw_pairs(**{**defaults, **settings})
        return [[document.text for document in side.documents] for side in pairs]

    return make


def test_both_sides_say_the_number_that_was_drawn(made):
    drawn = draw_numbers_and_dates("numbers", 3, 9, 40, 0)
    english, french = made()
    assert english == [num2words(number, lang="en") for number in drawn]
    assert french == [num2words(number, lang="fr") for number in drawn]


def test_dates_are_worded_by_cldr_and_words_are_not_numbers(made):
    english, german = made(kind="dates", target_language="de")
    days = draw_numbers_and_dates("dates", 3, 9, 40, 0)
    months = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember"
    for day, said, gesagt in zip(days, english, german, strict=True):
        assert said == f"{day:%A, %B} {day.day}, {day.year}"
        assert gesagt.endswith(f", {day.day}. {months.split()[day.month - 1]} {day.year}")


def test_all_numbers_of_digits_are_equally_common_and_within_their_range():
    numbers = draw_numbers_and_dates("numbers", 2, 5, 4000, 1)
    counts = np.bincount([len(str(number)) for number in numbers], minlength=6)
    assert counts[:2].tolist() == [0, 0]
    assert np.all(abs(counts[2:] - 1000) < 4.5 * np.sqrt(4000 / 4 * 3 / 4))  # chance: 3e-5
    assert {number for number in numbers if number < 100} == set(range(10, 100))


def test_dates_are_of_every_year_and_both_kinds_are_evenly_mixed():
    days = draw_numbers_and_dates("dates", 3, 9, 8000, 0)
    assert {day.year for day in days} == set(range(FIRST_DAY.year, LAST_DAY.year + 1))
    mixed = draw_numbers_and_dates("both", 3, 9, 4000, 0)
    dates = sum(isinstance(one, datetime.date) for one in mixed)
    assert abs(dates - 2000) < 4.5 * np.sqrt(4000 / 4)


def test_more_pairs_begin_with_the_fewer_and_another_seed_draws_others(made):
    few, more, other = made(), made(num_pairs=60), made(seed=1)
    assert [side[:40] for side in more] == few
    assert not set(other[0]) & set(few[0])


def test_what_was_made_once_is_kept(made, monkeypatch, tmp_path):
    first = made()
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("lineage_jax.data.number_words.draw_numbers_and_dates", None)
    assert made() == first
    assert made(source_language="fr", target_language="en") == first[::-1]


@pytest.mark.parametrize("language", ["xx", "tet", "english", ""])
def test_a_language_that_is_not_known_is_refused_by_name(made, language):
    with pytest.raises(ValueError, match=rf"came '{language}'; num2words has am, ar"):
        made(target_language=language)


@pytest.mark.parametrize("language", ["en_IN", "tr"])
def test_a_number_that_a_language_has_no_words_for_is_refused_by_name(made, language):
    with pytest.raises(ValueError, match=rf"no words for \d{{12,}} in '{language}'; lower --data"):
        made(target_language=language, min_digits=18, max_digits=18)
