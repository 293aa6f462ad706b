"""Words are left out as the papers say, pairs are what labels say, and (seed, step) decides all."""

import math

import numpy as np
import pytest

from lineage_jax.data import ByteTokenizer
from lineage_jax.data.masking import (
    MaskedBatches,
    SpecialTokens,
    draw,
    mask_tokens,
    shapes,
    special_tokens_after,
)
from lineage_jax.data.tokens import join

SPECIAL = SpecialTokens(padding=0, cls=2, sep=3, mask=1, vocab_size=1004)
SIZES = (40, 7, 1, 23, 90, 2, 15, 64)
NAMES = ("tokens", "targets", "types", "mask", "target_mask", "label")


def stream_of(*sizes):
    """Documents whose ids are all different and in order, so that an id tells where it stood."""
    ids = np.split(np.arange(4, 4 + sum(sizes)), np.cumsum(sizes)[:-1])
    return join(ids, SPECIAL.vocab_size, None)


STREAM = stream_of(*SIZES)
OWNER = np.repeat(np.arange(len(SIZES)), SIZES)  # of id 4 + i


def batches(**settings):
    return MaskedBatches(STREAM, SPECIAL, **{"batch_size": 6, "seq_len": 16, **settings})


def all_rows(made, epochs=1):
    """The rows of whole epochs, in the order of their first word."""
    steps = [made(step) for step in range(epochs * made.num_batches)]
    rows = {name: np.concatenate([step[name] for step in steps]) for name in NAMES}
    kept = rows["mask"].any(1)
    order = np.argsort(rows["targets"][kept, 1], kind="stable")
    return {name: x[kept][order] for name, x in rows.items()}


def parts_of(tokens, types, mask):
    """The texts of a row, without special tokens, and the special ones."""
    real, kinds = tokens[mask], types[mask]
    ends = np.flatnonzero(real == SPECIAL.sep)
    first = real[1 : ends[0]]
    second = real[ends[0] + 1 : ends[-1]] if len(ends) == 2 else real[:0]
    assert real[0] == SPECIAL.cls and ends[-1] == len(real) - 1
    np.testing.assert_array_equal(kinds, np.arange(len(real)) > ends[0])
    return first, second


@pytest.mark.parametrize("num_words", [1, 3, 10, 11, 300])
def test_fifteen_in_a_hundred_words_are_chosen_and_one_at_least(num_words):
    tokens = np.concatenate([[2], np.arange(4, 4 + num_words), [3, 0, 0]]).astype(np.int32)
    draws = draw(3 * len(tokens), 5, 9).reshape(3, -1)
    masked, chosen = mask_tokens(tokens, SPECIAL, draws)
    assert chosen.sum() == max(1, round(0.15 * num_words))
    assert not chosen[np.isin(tokens, SPECIAL.ids)].any()
    np.testing.assert_array_equal(masked[~chosen], tokens[~chosen])


def test_a_row_of_special_tokens_alone_stays_as_it_is():
    tokens = np.array([2, 3, 0, 0], np.int32)
    masked, chosen = mask_tokens(tokens, SPECIAL, draw(12, 0, 9).reshape(3, -1))
    assert not chosen.any() and masked.tolist() == tokens.tolist()


def test_of_the_chosen_eight_in_ten_are_masked_one_drawn_and_one_stays():
    made = batches(batch_size=40, seq_len=8, mask_rate=0.5)
    rows = [made(step) for step in range(50)]
    chosen = np.concatenate([row["target_mask"] for row in rows])
    tokens, targets = (np.concatenate([row[name] for row in rows]) for name in NAMES[:2])
    before, after = targets[chosen], tokens[chosen]
    n = len(after)
    words = SPECIAL.vocab_size - 4
    # A word that is drawn is itself with probability 1 / words, and then seems to have stayed.
    shares = {"masked": 0.8, "drawn": 0.1 * (1 - 1 / words), "stayed": 0.1 * (1 + 1 / words)}
    counts = {
        "masked": (after == SPECIAL.mask).sum(),
        "drawn": ((after != SPECIAL.mask) & (after != before)).sum(),
        "stayed": (after == before).sum(),
    }
    assert n > 4000 and sum(counts.values()) == n
    for name, p in shares.items():  # four standard deviations of a binomial: one run in 16,000
        assert abs(counts[name] - n * p) < 4 * math.sqrt(n * p * (1 - p)), name
    drawn = after[(after != SPECIAL.mask) & (after != before)]
    assert not np.isin(drawn, SPECIAL.ids).any()
    # Uniform over all words, those of no document too: the mean within four deviations of it.
    deviation = words / math.sqrt(12 * len(drawn))
    assert abs(drawn.mean() - (4 + SPECIAL.vocab_size - 1) / 2) < 4 * deviation


def test_a_word_is_drawn_from_all_that_are_no_special_tokens():
    special = SpecialTokens(padding=7, cls=0, sep=3, mask=4, vocab_size=10)
    words = [1, 2, 5, 6, 8, 9]
    drawing = (np.arange(6) + 0.5) / 6  # each of six words once
    draws = np.stack([np.zeros(6), np.full(6, 0.85), drawing])
    masked, _ = mask_tokens(np.full(6, 5, np.int32), special, draws, mask_rate=1.0)
    assert masked.tolist() == words


def test_every_word_is_chosen_as_often_as_every_other():
    tokens = np.arange(4, 24, dtype=np.int32)
    times = 2000
    count = sum(
        mask_tokens(tokens, SPECIAL, draw(60, 0, 9, i).reshape(3, -1))[1].astype(int)
        for i in range(times)
    )
    p = 3 / 20
    assert count.sum() == 3 * times
    assert (np.abs(count - times * p) < 5 * math.sqrt(times * p * (1 - p))).all()


@pytest.mark.parametrize("pairs", ["none", "next", "order"])
def test_masks_and_pairs_depend_on_seed_and_step_alone(pairs):
    made, again = batches(pairs=pairs, seed=3), batches(pairs=pairs, seed=3)
    backwards = {step: again(step) for step in reversed(range(9))}
    for step in range(9):
        for name in NAMES:
            np.testing.assert_array_equal(made(step)[name], backwards[step][name])
    other = batches(pairs=pairs, seed=4)
    assert any((other(s)["tokens"] != made(s)["tokens"]).any() for s in range(3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_static_masks_repeat_in_every_epoch_and_dynamic_ones_do_not(dynamic):
    made = batches(dynamic=dynamic, batch_size=1, pairs="order")
    epochs = []
    for epoch in range(3):
        first = epoch * made.num_rows
        rows = [made(step) for step in range(first, first + made.num_rows)]
        epochs.append({int(row["targets"].max()): row for row in rows})
    assert all(len(epoch) == made.num_rows for epoch in epochs)
    orders = [list(epoch) for epoch in epochs]
    assert orders[0] != orders[1]
    for other in epochs[1:]:
        for key, row in epochs[0].items():
            np.testing.assert_array_equal(row["targets"], other[key]["targets"])
        same = [(row["tokens"] == other[key]["tokens"]).all() for key, row in epochs[0].items()]
        assert all(same) if not dynamic else sum(same) < 0.5 * len(same)


def test_without_pairs_every_word_is_in_one_row_of_its_document_once_an_epoch():
    rows = all_rows(batches(batch_size=1))
    words = rows["targets"][rows["mask"] & ~np.isin(rows["targets"], SPECIAL.ids)]
    assert sorted(words.tolist()) == STREAM.ids.tolist()
    for tokens, types, mask in zip(rows["targets"], rows["types"], rows["mask"], strict=True):
        first, second = parts_of(tokens, types, mask)
        assert len(second) == 0 and len(np.unique(OWNER[first - 4])) == 1
    assert not rows["label"].any() and not rows["types"].any()


@pytest.mark.parametrize("pairs", ["next", "order"])
def test_a_label_says_whether_the_second_part_follows_the_first(pairs):
    rows = all_rows(batches(pairs=pairs, batch_size=1, seq_len=9))
    labels = rows["label"]
    for tokens, types, mask, label in zip(
        rows["targets"], rows["types"], rows["mask"], labels, strict=True
    ):
        first, second = parts_of(tokens, types, mask)
        assert len(first) and len(second)
        owners = OWNER[first[0] - 4], OWNER[second[0] - 4]
        assert (np.diff(first) == 1).all() and (np.diff(second) == 1).all()
        if label == 0:
            assert second[0] == first[-1] + 1 and owners[0] == owners[1]
        elif pairs == "order":
            assert first[0] == second[-1] + 1 and owners[0] == owners[1]
        else:
            assert owners[0] != owners[1]
    n = len(labels)
    assert n > 30 and abs(labels.sum() - n / 2) < 4 * math.sqrt(n / 4)


def test_the_parts_of_an_order_pair_are_the_same_words_as_those_of_a_next_pair():
    # Both cut a piece at the same place: what is swapped in one is mixed in the other.
    order, following = (all_rows(batches(pairs=p, batch_size=1)) for p in ("order", "next"))
    told = [
        {tuple(sorted(row[mask].tolist())) for row, mask, label in zip(*columns, strict=True)
         if label == 0}
        for columns in (
            (rows["targets"], rows["mask"], rows["label"]) for rows in (order, following)
        )
    ]  # fmt: skip
    assert told[0] == told[1]


def test_targets_are_the_words_as_they_were_and_padding_is_none():
    rows = all_rows(batches(pairs="next"), epochs=2)
    assert not rows["target_mask"][~rows["mask"]].any()
    assert (rows["targets"][~rows["mask"]] == SPECIAL.padding).all()
    unchosen = ~rows["target_mask"]
    np.testing.assert_array_equal(rows["tokens"][unchosen], rows["targets"][unchosen])
    assert rows["target_mask"].any(1).all()
    assert not np.isin(rows["targets"][rows["target_mask"]], SPECIAL.ids).any()


def test_an_evaluation_has_every_row_once_and_is_filled_up_with_padding():
    made = batches(shuffle=False, batch_size=5)
    rows = {name: [] for name in NAMES}
    for step in range(made.num_batches):
        for name, x in made(step).items():
            rows[name].append(x)
    rows = {name: np.concatenate(x) for name, x in rows.items()}
    real = np.arange(len(rows["mask"])) < made.num_rows
    assert rows["mask"].any(1).tolist() == real.tolist() and not real.all()
    assert not rows["target_mask"][~real].any()
    words = rows["targets"][rows["mask"] & ~np.isin(rows["targets"], SPECIAL.ids)]
    assert words.tolist() == STREAM.ids.tolist()
    with pytest.raises(ValueError, match=f"a step below {made.num_batches}, .*, came"):
        made(made.num_batches)


def test_some_rows_of_a_batch_are_those_of_the_whole():
    rows = np.array([1, 4])
    whole, part = batches(pairs="next")(3), batches(pairs="next")(3, rows)
    for name in NAMES:
        np.testing.assert_array_equal(part[name], whole[name][rows])


def test_the_shapes_of_a_batch_are_told_without_one():
    batch = batches()(0)
    assert {name: (x.shape, x.dtype.type) for name, x in batch.items()} == shapes(6, 16)
    assert batches().epoch(7) == 42 / batches().num_rows


def test_special_tokens_in_a_document_are_left_out():
    tokenizer = ByteTokenizer()
    special = special_tokens_after(tokenizer.vocab_size)
    assert special.ids == (257, 258, 259, 260) and special.vocab_size == 261
    ids = [np.array([5, special.mask, 6, special.sep])]
    made = MaskedBatches(join(ids, 261, None), special, batch_size=1, seq_len=6)
    assert made(0)["targets"].tolist() == [[special.cls, 5, 6, special.sep, 257, 257]]


def test_numbers_are_the_upper_bits_of_philox_with_a_stream_for_each_purpose():
    raw = np.random.Philox(key=[7, 2], counter=[0, 0, 3, 4]).random_raw(4)
    np.testing.assert_array_equal(draw(4, 7, 2, 3, 4), (raw >> np.uint64(11)) / 2**53)
    places = [(0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 0, 0, 1)]
    assert len({tuple(draw(3, *place)) for place in places}) == len(places)
    many = draw(10_000, 1, 2)
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 4 / math.sqrt(12 * 10_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_size=0), "batch_size >= 1, came 0"),
        (dict(seq_len=2), "seq_len >= 3, came 2"),
        (dict(seq_len=4, pairs="next"), "seq_len >= 5, came 4"),
        (dict(seed=-1), "seed >= 0, came -1"),
        (dict(mask_rate=0.0), "0 < mask_rate <= 1, came 0.0"),
        (dict(batch_size=99), "one batch of 99 x 16 tokens, came 22 rows; give more text"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        batches(**settings)


def test_ids_and_documents_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"four ids in \[0, 10\), came \(0, 0, 3, 1\)"):
        SpecialTokens(padding=0, cls=0, sep=3, mask=1, vocab_size=10)
    with pytest.raises(ValueError, match="ids below 1004, came 2000"):
        MaskedBatches(join([np.array([2000])], 3000, None), SPECIAL, batch_size=1, seq_len=8)
    with pytest.raises(ValueError, match="two documents or more to make pairs of"):
        MaskedBatches(stream_of(9), SPECIAL, batch_size=1, seq_len=8, pairs="next")
