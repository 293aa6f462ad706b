"""Rows hold the pairs, once an epoch, in an order and shapes that seed and step alone decide."""

import numpy as np
import pytest

from lineage_jax.data import PairBatches
from lineage_jax.data.pair_batches import shapes
from lineage_jax.data.tokens import join

NAMES = ("tokens", "targets", "mask", "source", "source_mask")
START = END = 7


def stream_of(*sizes, first=1000):
    """Documents of these many tokens and the end symbol; the first of document i is first + i."""
    documents = [np.r_[first + i, np.arange(10, 9 + size), END] for i, size in enumerate(sizes)]
    return join(documents, 10**6, None)


def batches_of(source_sizes, target_sizes, **settings):
    settings = {"batch_size": 2, "source_len": 9, "target_len": 9, "start": START, **settings}
    return PairBatches(stream_of(*source_sizes), stream_of(*target_sizes, first=5000), **settings)


def many(num_pairs=96, **settings):
    """Pairs whose source is from 1 to 12 tokens long and whose target is one or two longer."""
    sizes = np.arange(num_pairs) * 5 % 12 + 1
    extra = 1 + np.arange(num_pairs) % 2
    return batches_of(sizes, sizes + extra, source_len=16, target_len=16, **settings)


def met(batch):
    """The numbers of the pairs in a batch."""
    real = batch["mask"].any(axis=-1)
    return (batch["source"][..., 0][real] - 1000).tolist()


def test_a_row_is_the_pair_with_its_start_and_end_symbols_and_padding():
    batch = batches_of([3, 2], [2, 3], source_len=5, target_len=6, shuffle=False)(0)
    expected = {
        "tokens": [[7, 5000, 10, 0, 0, 0], [7, 5001, 10, 11, 0, 0]],
        "targets": [[5000, 10, 7, 0, 0, 0], [5001, 10, 11, 7, 0, 0]],
        "mask": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]],
        "source": [[1000, 10, 11, 7, 0], [1001, 10, 7, 0, 0]],
        "source_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
    }
    assert list(batch) == list(expected)
    for name, rows in expected.items():
        np.testing.assert_array_equal(batch[name], rows, err_msg=name)


def test_a_pair_that_fills_its_row_is_kept_and_one_token_more_is_left_out():
    batches = batches_of([4, 5, 4], [3, 3, 4], source_len=5, target_len=4, shuffle=False)
    assert (batches.kept.tolist(), batches.left_out, batches.num_rows) == ([0], 2, 1)
    batch = batches(0)
    assert batch["source_mask"][0].all() and batch["mask"][0].all()
    assert (batch["source"][0, -1], batch["targets"][0, -1], batch["tokens"][0, 0]) == (7, 7, 7)


def test_an_evaluation_meets_every_pair_once_in_order_and_ends_in_padding():
    batches = many(10, batch_size=4, shuffle=False)
    assert batches.num_batches == 3
    assert [number for step in range(3) for number in met(batches(step))] == list(range(10))
    for name in NAMES:
        assert not batches(2)[name][2:].any()
    with pytest.raises(ValueError, match="a step below 3"):
        batches(3)


@pytest.mark.parametrize("num_buckets", [1, 3])
def test_each_epoch_meets_every_pair_once_in_an_order_of_its_own(num_buckets):
    batches = many(batch_size=8, num_buckets=num_buckets)
    epochs = [
        tuple(number for step in range(12 * e, 12 * e + 12) for number in met(batches(step)))
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(96)) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert [batches.epoch(step) for step in (0, 6, 12)] == [0, 0.5, 1]


def test_pairs_that_fill_no_batch_sit_out_an_epoch_and_not_always_the_same():
    batches = many(30, batch_size=8, num_buckets=2)
    assert batches.num_batches == 3
    absent = []
    for epoch in range(20):
        steps = range(3 * epoch, 3 * epoch + 3)
        present = [number for step in steps for number in met(batches(step))]
        assert len(set(present)) == len(present) == 24
        absent += set(range(30)) - set(present)
    assert len(set(absent)) > 24  # of 120 absences; 30 but for chance


def test_buckets_bring_pairs_of_similar_length_together_and_padding_falls():
    def padding(num_buckets):
        batches = many(batch_size=8, num_buckets=num_buckets)
        epoch = [batches(step) for step in range(batches.num_batches)]
        masks = [batch[name] for batch in epoch for name in ("mask", "source_mask")]
        return sum((~mask).sum() for mask in masks)

    assert padding(4) < padding(2) < padding(1)
    assert padding(4) < padding(1) / 2


def test_no_bucket_cuts_off_a_pair_that_is_long_on_one_side_alone():
    # Three buckets, by the sum; the first has longer sources than the second, and they meet.
    sizes = np.array([[12] * 5 + [7] * 5 + [9] * 5, [1] * 5 + [7] * 5 + [9] * 5])
    batches = batches_of(*sizes, source_len=16, target_len=16, num_buckets=3)
    for step in range(batches.num_batches):
        batch = batches(step)
        numbers = met(batch)
        np.testing.assert_array_equal(batch["source_mask"].sum(axis=1), sizes[0][numbers] + 1)
        np.testing.assert_array_equal(batch["mask"].sum(axis=1), sizes[1][numbers] + 1)


def test_a_batch_has_the_shape_of_its_longest_bucket_and_no_other():
    batches = many(batch_size=8, num_buckets=3)
    lengths = batches.lengths.tolist()
    assert lengths[-1] == [16, 16] and lengths == sorted(lengths)
    seen = set()
    for step in range(batches.num_batches):
        batch = batches(step)
        shape = [batch["source"].shape[1], batch["tokens"].shape[1]]
        needed = [batch[name].sum(axis=1).max() for name in ("source_mask", "mask")]
        smallest = next(each for each in lengths if np.all(np.array(each) >= needed))
        assert shape == smallest
        seen.add(tuple(shape))
    assert len(seen) == 3


def test_a_batch_depends_on_seed_and_step_alone():
    batches, again, other = (many(batch_size=4, num_buckets=2, seed=seed) for seed in (3, 3, 4))
    backwards = {step: again(step) for step in reversed(range(60))}
    for step in range(60):
        for name in NAMES:
            np.testing.assert_array_equal(batches(step)[name], backwards[step][name])
    assert [met(batches(step)) for step in range(9)] != [met(other(step)) for step in range(9)]


@pytest.mark.parametrize("rows", [[0, 1, 2], [5], [1, 4], [0, 1, 2, 3, 4, 5]])
def test_some_rows_of_a_batch_are_those_of_the_whole_and_of_its_shape(rows):
    rows = np.array(rows)
    for settings in ({"num_buckets": 3}, {"shuffle": False}):
        batches = many(batch_size=6, **settings)
        for step in range(5):
            whole, part = batches(step), batches(step, rows)
            for name in NAMES:
                np.testing.assert_array_equal(part[name], whole[name][rows])


def test_stacked_steps_are_the_steps_padded_to_the_largest_among_them():
    batches = many(batch_size=8, num_buckets=3)
    for rows in (None, np.array([1, 2])):
        stacked = batches.stack(1, 6, rows)
        steps = [batches(step, rows) for step in range(1, 7)]
        assert len({batch["tokens"].shape for batch in steps}) > 1
        for name in NAMES:
            width = max(batch[name].shape[1] for batch in steps)
            padded = [
                np.pad(batch[name], ((0, 0), (0, width - batch[name].shape[1]))) for batch in steps
            ]
            np.testing.assert_array_equal(stacked[name], np.stack(padded))


def test_the_shapes_of_a_batch_are_told_without_one():
    batch = batches_of([3, 2], [2, 3], source_len=5, target_len=6)(0)
    told = {name: (array.shape, array.dtype.type) for name, array in batch.items()}
    assert told == shapes(2, 5, 6)
    assert next(iter(told)) == "tokens"


def test_a_grain_dataset_of_the_batches_is_the_batches():
    batches, rows = many(batch_size=4), np.array([2, 3])
    dataset = batches.to_grain(rows)
    for step in (0, 7, 1000):
        np.testing.assert_array_equal(dataset[step]["tokens"], batches(step, rows)["tokens"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1, came 0"),
        ({"source_len": 0}, "source_len >= 1, came 0"),
        ({"num_buckets": 0}, "buckets >= 1, came 0"),
        ({"seed": -1}, "seed >= 0, came -1"),
        ({"batch_size": 3}, "at least 3 pairs of up to 9 and 9 tokens, came 2, and 1 that are"),
        ({"source_len": 2, "shuffle": False}, "at least 1 pairs .* came 0, and 3 that are longer"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        batches_of([2, 3, 20], [2, 3, 3], **settings)
