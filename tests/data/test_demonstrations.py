"""Tasks made from nothing: their sentences are true, and what is held out is never told."""

import itertools
import re

import numpy as np
from num2words import num2words

from lineage_jax.data.demonstrations import (
    TASKS,
    among_text,
    demonstrations,
    linear_functions,
    random_mappings,
)

FRENCH = {num2words(n, lang="en"): num2words(n, lang="fr") for n in range(1000)}


def some(count, **options):
    return list(itertools.islice(demonstrations(1, **options), count))


def test_every_sentence_is_true():
    for case in some(300, heldout=False) + some(300, heldout=True):
        if case.task == "translation":
            english, french = re.fullmatch(r"(.+) in French is (.+)\.", case.sentence).groups()
            assert FRENCH[english] == french
        elif case.task == "sum":
            a, b, c = map(int, re.fullmatch(r"(\d+) plus (\d+) is (\d+)\.", case.sentence).groups())
            assert a + b == c
        else:
            word, back = re.fullmatch(r"([a-z]+) reversed is ([a-z]+)\.", case.sentence).groups()
            assert "".join(reversed(word)) == back


def test_a_case_that_is_held_out_is_never_told_whatever_the_seed():
    told = {case.prompt for case in some(3000, heldout=False)}
    told |= {c.prompt for c in itertools.islice(demonstrations(2, heldout=False), 3000)}
    asked = {case.prompt for case in some(300, heldout=True)}
    assert not told & asked
    assert {case.task for case in some(3, heldout=True)} == set(TASKS)


def test_a_seed_tells_the_same_cases_again():
    first = some(30, heldout=False)
    assert first == some(30, heldout=False)
    assert first != list(itertools.islice(demonstrations(2, heldout=False), 30))


def test_a_paragraph_goes_on_with_sentences():
    cases = demonstrations(1, heldout=False)
    first, second = among_text(["One.", "Two."], cases, cases_per_paragraph=2)
    told = [case.sentence for case in some(4, heldout=False)]
    assert first.text == "\n".join(["One.", *told[:2]])
    assert second.text == "\n".join(["Two.", *told[2:]])


def test_a_mapping_holds_in_its_row_and_in_no_other():
    sizes = dict(rows=40, num_pairs=12, num_keys=3, num_values=50)
    rows = random_mappings(1, 2, **sizes)
    assert rows.shape == (40, 24) and rows.dtype == np.int32
    keys, values = rows[:, ::2], rows[:, 1::2]
    assert set(keys.ravel()) == {0, 1, 2} and values.min() >= 3 and values.max() < 53
    mappings = [dict(zip(k, v, strict=True)) for k, v in zip(keys, values, strict=True)]
    for mapping, k, v in zip(mappings, keys, values, strict=True):
        assert [mapping[x] for x in k] == v.tolist()
    assert len({mapping.get(0) for mapping in mappings}) > 10
    np.testing.assert_array_equal(rows, random_mappings(1, 2, **sizes))
    assert (rows != random_mappings(1, 3, **sizes)).any()
    assert (rows != random_mappings(2, 2, **sizes)).any()


def test_a_linear_function_is_found_by_least_squares():
    sizes = dict(rows=30, num_points=9, dim=3)
    x, y = linear_functions(1, 2, noise=0.0, **sizes)
    noisy = linear_functions(1, 2, noise=0.5, **sizes)
    slopes = []
    for row, values, told in zip(x, y, noisy[1], strict=True):
        w, _, _, _ = np.linalg.lstsq(row[:4], values[:4], rcond=None)
        np.testing.assert_allclose(row @ w, values, atol=1e-3)
        slopes.append(w)
        assert 0.1 < (told - values).std() < 1.0
    assert 0.5 < np.std(slopes) < 1.5
    np.testing.assert_array_equal(x, noisy[0])
