"""Rows hold the texts between their marks, and a batch is a function of seed and step alone."""

import numpy as np
import pytest

from lineage_jax.data import ByteTokenizer, LabelledBatches, Marks
from lineage_jax.data.labelled_batches import (
    both_orders,
    choices,
    end_of_text_marks,
    lay_out,
    shapes,
)

MARKS = Marks(start=91, between=92, end=93, padding=90)


def ids(first, size):
    return np.arange(first, first + size)


def many(count=30, num_texts=1, **settings):
    """Example i has texts of from 1 to 5 tokens that begin with i, and the label i % 3."""
    texts = [
        [np.append(i, ids(100, i * (text + 3) % 5)) for text in range(num_texts)]
        for i in range(count)
    ]
    settings = {"batch_size": 4, "seq_len": 9, **settings}
    return LabelledBatches(texts, [i % 3 for i in range(count)], MARKS, **settings)


def met(batch):
    """The numbers of the examples in a batch."""
    return batch["tokens"][..., 1][batch["mask"].any(-1)].tolist()


def test_a_row_is_one_text_or_two_between_marks_and_padding():
    one = LabelledBatches([[ids(1, 3)]], [2], MARKS, batch_size=1, seq_len=7)(0)
    two = LabelledBatches([[ids(1, 2), ids(5, 1)]], [1], MARKS, batch_size=1, seq_len=7)(0)
    expected = [
        (one, [91, 1, 2, 3, 93, 90, 90], [0] * 7, [1] * 5 + [0] * 2, 2),
        (two, [91, 1, 2, 92, 5, 93, 90], [0, 0, 0, 0, 1, 1, 0], [1] * 6 + [0], 1),
    ]
    for batch, tokens, types, mask, label in expected:
        assert list(batch) == ["tokens", "types", "mask", "label"]
        for name, row in zip(batch, (tokens, types, mask, label), strict=True):
            np.testing.assert_array_equal(batch[name][0], row, err_msg=name)
        found = {name: (array.shape, array.dtype) for name, array in batch.items()}
        assert found == shapes(1, 7)


@pytest.mark.parametrize(
    ("sizes", "room", "kept"),
    [
        ((9,), 6, (6,)),
        ((6,), 6, (6,)),
        ((3, 3), 6, (3, 3)),
        ((9, 9), 7, (4, 3)),  # the longer loses a token, the second where they are equal
        ((2, 9), 7, (2, 5)),
        ((9, 2), 7, (5, 2)),
        ((9, 3), 7, (4, 3)),
        ((0, 9), 7, (0, 7)),
    ],
)
def test_what_does_not_fit_is_cut_from_the_end_of_the_longer_text(sizes, room, kept):
    texts = [ids(10 * i, size) for i, size in enumerate(sizes)]
    row, second = lay_out(texts, MARKS, room + len(sizes) + 1)
    parts = [text[:size].tolist() for text, size in zip(texts, kept, strict=True)]
    expected = [91, *parts[0], *[i for part in parts[1:] for i in (92, *part)], 93]
    assert row.tolist() == expected
    assert second == kept[0] + 2


def test_a_pair_without_an_order_is_two_rows_and_a_question_one_for_each_answer():
    first, second, third = ids(1, 2), ids(5, 1), ids(7, 2)
    rows = both_orders(first, second, MARKS, 9)
    assert [row.tolist() for row in rows] == [[91, 1, 2, 92, 5, 93], [91, 5, 92, 1, 2, 93]]
    rows = choices(first, [second, third], MARKS, 9)
    assert [row.tolist() for row in rows] == [[91, 1, 2, 92, 5, 93], [91, 1, 2, 92, 7, 8, 93]]


def test_a_tokenizer_without_marks_lends_its_end_of_text():
    assert end_of_text_marks(ByteTokenizer()) == Marks(start=256, between=256, end=256, padding=0)


def test_each_epoch_meets_every_example_once_with_its_label_in_an_order_of_its_own():
    batches = many(30)
    numbers, labels = [], []
    for step in range(15):  # two epochs: 7.5 batches each
        batch = batches(step)
        numbers += met(batch)
        labels += batch["label"].tolist()
    assert sorted(numbers[:30]) == sorted(numbers[30:]) == list(range(30))
    assert numbers[:30] != numbers[30:]
    assert labels == [number % 3 for number in numbers]
    assert [batches.epoch(step) for step in (0, 15)] == [0, 2]


def test_an_evaluation_meets_every_example_once_in_order_and_ends_in_padding():
    batches = many(10, shuffle=False)
    assert batches.num_batches == 3
    assert [number for step in range(3) for number in met(batches(step))] == list(range(10))
    last = batches(2)
    assert (last["tokens"][2:] == 90).all() and not last["mask"][2:].any()
    with pytest.raises(ValueError, match="a step below 3"):
        batches(3)


def test_rows_of_a_batch_and_steps_on_end_are_the_batches_themselves():
    batches = many(30, num_texts=2, seed=3)
    stacked = batches.stack(5, 4)
    for place, step in enumerate(range(5, 9)):
        whole = batches(step)
        for name, array in whole.items():
            np.testing.assert_array_equal(stacked[name][place], array)
            np.testing.assert_array_equal(batches(step, np.array([1, 3]))[name], array[[1, 3]])
    again, other = many(30, num_texts=2, seed=3), many(30, num_texts=2, seed=4)
    np.testing.assert_array_equal(again(6)["tokens"], batches(6)["tokens"])
    assert not np.array_equal(other(6)["tokens"], batches(6)["tokens"])
    np.testing.assert_array_equal(batches.to_grain()[6]["tokens"], batches(6)["tokens"])


def test_examples_longer_than_a_row_are_counted():
    assert many(30, seq_len=9).cut == 0
    assert many(30, seq_len=6).cut == 6  # of five tokens and two marks: every fifth


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 31}, "at least one batch of 31 examples, came 30"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"seq_len": 2}, "seq_len >= 3"),
        ({"num_texts": 2, "seq_len": 4}, "seq_len >= 5"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        many(30, **settings)
