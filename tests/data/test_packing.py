"""Rows hold the stream, once an epoch, in an order that seed and step alone decide."""

import numpy as np
import pytest

from lineage_jax.data import Batches
from lineage_jax.data.packing import shapes
from lineage_jax.data.tokens import join

NAMES = ("tokens", "targets", "positions", "segment_ids", "mask")


def stream_of(*sizes):
    """Documents whose ids are all different, from 1 on, so that padding's 0 is none of them."""
    ids = np.split(np.arange(1, sum(sizes) + 1), np.cumsum(sizes)[:-1])
    return join(ids, 10**6, None)


RAGGED = stream_of(3, 1, 9, 1, 2, 14, 5, 1, 1, 20)  # 57 tokens, 10 documents, 47 targets


def one_by_one(stream, seq_len, row):
    """A row of the packing, written as its definition reads."""
    owner = [i for i, ids in enumerate(stream.documents) for _ in ids]
    columns = {name: [] for name in NAMES}
    first = row * seq_len
    segment, position = 1, -1
    for place in range(first, first + seq_len):
        real = place < len(owner)
        if real and place > first and owner[place] != owner[place - 1]:
            segment, position = segment + 1, -1
        position += 1
        after = place + 1 < len(owner)
        columns["tokens"].append(stream.ids[place] if real else 0)
        columns["targets"].append(stream.ids[place + 1] if after else 0)
        columns["positions"].append(position if real else 0)
        columns["segment_ids"].append(segment if real else 0)
        columns["mask"].append(after and owner[place] == owner[place + 1])
    return columns


@pytest.mark.parametrize("seq_len", [1, 2, 4, 7, 8, 56, 57, 100])
def test_each_row_is_what_the_definition_says(seq_len):
    batches = Batches(RAGGED, batch_size=1, seq_len=seq_len, shuffle=False)
    assert batches.num_rows == batches.num_batches == -(-56 // seq_len)
    for row in range(batches.num_rows):
        batch = batches(row)
        for name, expected in one_by_one(RAGGED, seq_len, row).items():
            np.testing.assert_array_equal(batch[name], [expected], err_msg=f"{name} of row {row}")
            assert batch[name].dtype == (bool if name == "mask" else np.int32)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
@pytest.mark.parametrize("seq_len", [5, 8])
def test_an_evaluation_counts_every_target_exactly_once(batch_size, seq_len):
    batches = Batches(RAGGED, batch_size=batch_size, seq_len=seq_len, shuffle=False)
    all_batches = [batches(step) for step in range(batches.num_batches)]
    assert all(batch["tokens"].shape == (batch_size, seq_len) for batch in all_batches)
    counted = np.concatenate([batch["targets"][batch["mask"]] for batch in all_batches])
    expected = np.concatenate([document[1:] for document in RAGGED.documents])
    assert counted.tolist() == expected.tolist()
    assert len(counted) == RAGGED.num_targets == 47
    with pytest.raises(ValueError, match=f"a step below {batches.num_batches}"):
        batches(batches.num_batches)


def test_rows_beyond_the_last_are_padding_through_and_through():
    batches = Batches(stream_of(9), batch_size=4, seq_len=4, shuffle=False)  # two rows
    batch = batches(0)
    for name in NAMES:
        assert not batch[name][2:].any()
    assert batch["mask"][:2].all()


def test_a_padded_position_is_segment_zero_and_masked():
    batch = Batches(stream_of(6), batch_size=2, seq_len=4, shuffle=False)(0)
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["mask"].tolist() == [[True] * 4, [True, False, False, False]]


def test_no_position_that_counts_predicts_across_documents():
    batch = Batches(RAGGED, batch_size=8, seq_len=7, shuffle=False)(0)
    starts = {int(document[0]) for document in RAGGED.documents}
    assert not starts & set(batch["targets"][batch["mask"]].tolist())


def rows_met(batches, first_step, num_steps):
    return [int(row[0]) for s in range(first_step, first_step + num_steps)
            for row in batches(s)["tokens"]]  # fmt: skip


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    batches = Batches(stream_of(4 * 30 + 1), batch_size=3, seq_len=4, seed=5)
    epochs = [rows_met(batches, 10 * epoch, 10) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1, 121, 4)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [batches.epoch(step) for step in (0, 5, 10)] == [0, 0.5, 1]
    assert batches.tokens_per_batch == 12


def test_a_batch_that_spans_two_epochs_drops_and_repeats_no_row():
    batches = Batches(stream_of(4 * 7 + 1), batch_size=3, seq_len=4)  # 7 rows: 3 + 3 + (1 + 2)
    met = rows_met(batches, 0, 7)
    for epoch in range(3):
        assert sorted(met[7 * epoch : 7 * epoch + 7]) == list(range(1, 29, 4))


def test_a_batch_depends_on_seed_and_step_alone():
    stream = stream_of(500)
    batches, again = (Batches(stream, batch_size=4, seq_len=8, seed=3) for _ in range(2))
    backwards = {step: again(step) for step in reversed(range(20))}
    for step in range(20):
        for name in NAMES:
            np.testing.assert_array_equal(batches(step)[name], backwards[step][name])
    other = Batches(stream, batch_size=4, seq_len=8, seed=4)
    assert rows_met(other, 0, 20) != rows_met(batches, 0, 20)


def test_epochs_of_neighbouring_seeds_share_no_order():
    stream = stream_of(4 * 20 + 1)
    orders = [
        tuple(rows_met(Batches(stream, batch_size=20, seq_len=4, seed=seed), epoch, 1))
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16


def test_the_order_of_rows_is_the_same_on_every_machine_and_version():
    batches = Batches(stream_of(4 * 8 + 1), batch_size=8, seq_len=4, seed=1)
    met = [row // 4 for row in rows_met(batches, 0, 2)]
    assert met == [3, 5, 2, 7, 0, 6, 1, 4, 0, 6, 5, 3, 4, 7, 2, 1]  # Philox's, for ever


@pytest.mark.parametrize("rows", [[0, 1, 2], [5], [1, 4], [0, 1, 2, 3, 4, 5]])
def test_some_rows_of_a_batch_are_those_of_the_whole(rows):
    rows = np.array(rows)
    for shuffle in (True, False):
        batches = Batches(RAGGED, batch_size=6, seq_len=5, shuffle=shuffle)
        whole, part = batches(1), batches(1, rows)
        for name in NAMES:
            np.testing.assert_array_equal(part[name], whole[name][rows])


def test_stacked_steps_are_the_steps():
    batches = Batches(RAGGED, batch_size=4, seq_len=5, seed=2)
    for rows in (None, np.array([1, 2])):
        stacked = batches.stack(1, 6, rows)
        for name in NAMES:
            steps = [batches(step, rows)[name] for step in range(1, 7)]
            np.testing.assert_array_equal(stacked[name], np.stack(steps))


def test_the_shapes_of_a_batch_are_told_without_one():
    batch = Batches(RAGGED, batch_size=4, seq_len=5)(0)
    told = {name: (array.shape, array.dtype.type) for name, array in batch.items()}
    assert told == shapes(4, 5)


def test_a_grain_dataset_of_the_batches_is_the_batches():
    batches, rows = Batches(RAGGED, batch_size=4, seq_len=5), np.array([2, 3])
    dataset = batches.to_grain(rows)
    for step in (0, 7, 1000):
        np.testing.assert_array_equal(dataset[step]["tokens"], batches(step, rows)["tokens"])
    assert len(Batches(RAGGED, batch_size=4, seq_len=5, shuffle=False).to_grain()) == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1, came 0"),
        ({"seq_len": -1}, "seq_len >= 1, came -1"),
        ({"seed": -1}, "seed >= 0, came -1"),
        ({"batch_size": 15}, "one batch of 15 x 4 tokens, came 57 tokens, 14 rows; give more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Batches(RAGGED, **{"batch_size": 2, "seq_len": 4, **kwargs})


def test_a_stream_with_nothing_to_predict_is_refused():
    for stream in (stream_of(1, 1, 1), join([], 10, None)):
        with pytest.raises(ValueError, match="at least two tokens in a document"):
            Batches(stream, batch_size=1, seq_len=4)
