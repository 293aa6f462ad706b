"""Texts become sources and targets as the paper's figures and arithmetic have it, by seed alone."""

import collections
import itertools
import math

import numpy as np
import pytest

from lineage_jax.data.pair_batches import shapes
from lineage_jax.data.span_corruption import (
    DenoisingBatches,
    lengths,
    longest_text,
    masked,
    noise_counts,
    random_spans,
    spans_replaced,
)
from lineage_jax.data.tokens import join

NAMES = ("tokens", "targets", "mask", "source", "source_mask")
OBJECTIVES = ("span_corruption", "reconstruction", "prefix_lm", "lm")
START, END, VOCAB = 0, 1, 1000
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def philox(seed=0):
    return np.random.Philox(key=seed)


def batches_of(num_tokens=405, **settings):
    """Texts whose ids all differ, from 2 on, in two documents."""
    ids = np.arange(2, 2 + num_tokens)
    stream = join(np.split(ids, [num_tokens // 3]), VOCAB, None)
    given = dict(batch_size=4, text_len=20, vocab_size=VOCAB, start=START, end=END)
    return DenoisingBatches(stream, **given | settings)


def pairs_of(batch):
    """The ids of each source and target that are there."""
    names = ("source", "source_mask", "targets", "mask")
    rows = zip(*(batch[name] for name in names), strict=True)
    return [(source[there], target[counted]) for source, there, target, counted in rows]


def test_a_text_is_corrupted_as_in_figure_2():
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    x, y, z = 100, 101, 102
    noise = np.isin(words, ["for", "inviting", "last"])
    names = {**dict(enumerate(words)), x: "<X>", y: "<Y>", z: "<Z>"}  # ids are places

    def text(spans):
        found = spans_replaced(np.arange(len(words)), spans, np.array([x, y, z]))
        return " ".join(names[i] for i in found.tolist())

    assert text(noise) == "Thank you <X> me to your party <Y> week ."
    assert text(~noise) == "<X> for inviting <Y> last <Z>"


@pytest.mark.parametrize("kept_first", [True, False])
def test_each_span_is_one_sentinel_wherever_it_stands(kept_first):
    text, sentinels = np.array([5, 6, 7, 8]), np.array([90, 91])
    spans = np.array([False, True, True, False]) ^ (not kept_first)
    expected = [5, 90, 8] if kept_first else [90, 6, 7, 91]
    assert spans_replaced(text, spans, sentinels).tolist() == expected


def test_500_tokens_have_the_noise_that_section_3_3_4_counts():
    assert noise_counts(500, 0.15, 3.0) == (75, 25)
    assert lengths(500) == (425 + 25 + 1, 75 + 25 + 1)


def test_a_source_of_512_tokens_is_made_of_the_released_568():
    assert (longest_text(512), lengths(568)) == (568, (512, 114))


SETTINGS = list(itertools.product((0.1, 0.15, 0.5, 0.9), (1.0, 2.0, 3.0, 10.0)))


@pytest.mark.parametrize(("density", "span_len"), SETTINGS)
def test_lengths_are_those_of_the_pairs_that_are_made(density, span_len):
    sentinels = np.arange(1000, 1100)
    for text_len in (2, 3, 4, 7, 20, 61):
        noise, spans = noise_counts(text_len, density, span_len)
        for seed in range(5):
            hidden = random_spans(text_len, philox(seed), density, span_len)
            text = np.arange(text_len)
            pair = [spans_replaced(text, one, sentinels) for one in (hidden, ~hidden)]
            assert tuple(len(ids) + 1 for ids in pair) == lengths(text_len, density, span_len)
            assert hidden.sum() == noise and not hidden[0] and hidden[-1]
            assert (np.diff(hidden.astype(int)) == 1).sum() == spans


@pytest.mark.parametrize(("density", "span_len"), SETTINGS)
def test_the_longest_text_is_found_among_all(density, span_len):
    for source_len in (3, 4, 5, 9, 20, 33):
        # Each token of the source holds back at most span_len or 1 / (1 - density) of the text.
        tried = range(2, 50 * source_len)
        fitting = [n for n in tried if lengths(n, density, span_len)[0] <= source_len]
        assert longest_text(source_len, density, span_len) == max(fitting)
        assert fitting == list(range(2, max(fitting) + 1))


def test_all_divisions_into_spans_are_equally_likely():
    # Of 10 tokens 4 are noise, in 2 spans: 3 ways to divide it, and 5 for the 6 that are kept.
    drawn = 3000
    found = collections.Counter(
        tuple(random_spans(10, philox(seed), 0.4, 2.0).tolist()) for seed in range(drawn)
    )
    assert len(found) == 15
    expected = drawn / 15
    chi_squared = sum((count - expected) ** 2 / expected for count in found.values())
    assert chi_squared < 36.1  # of 14 degrees of freedom, one draw in a thousand is above


def test_every_token_of_a_text_is_in_exactly_one_of_source_and_target():
    batches = batches_of(shuffle=False)
    sentinels = batches.sentinels.tolist()
    texts = np.arange(2, 402).reshape(20, 20)
    assert batches.num_rows == 20  # the last 5 tokens are left out
    for step, text in zip(range(5), np.split(texts, 5), strict=True):
        for row, (source, target) in zip(text, pairs_of(batches(step)), strict=True):
            assert source[-1] == target[-1] == END
            ids = [i for i in (*source[:-1], *target[:-1]) if i not in sentinels]
            assert sorted(ids) == row.tolist()
            # The text again: each sentinel of the source stands for what follows it in the target.
            after = collections.defaultdict(list)
            for i in target[:-1].tolist():
                if i in sentinels:
                    span = i
                else:
                    after[span].append(i)
            filled = [j for i in source[:-1].tolist() for j in after.get(i, [i])]
            assert filled == row.tolist()


def test_sentinels_descend_from_the_top_of_the_vocabulary_in_their_order():
    batches = batches_of(text_len=40)
    assert batches.sentinels.tolist() == [999, 998]
    for source, target in pairs_of(batches(0)):
        for ids in (source, target):
            assert [i for i in ids.tolist() if i >= 900] == [999, 998]
    given = batches_of(text_len=40, sentinels=[700, 800, 600])
    for source, target in pairs_of(given(0)):
        for ids in (source, target):
            assert [i for i in ids.tolist() if i >= 600] == [700, 800]


@each_objective
def test_rows_are_of_fixed_lengths_and_the_target_follows_its_start(objective):
    batches = batches_of(objective=objective)
    batch = batches(3)
    told = {name: (array.shape, array.dtype.type) for name, array in batch.items()}
    assert told == shapes(4, batches.source_len, batches.target_len)
    assert list(told) == list(shapes(1, 1, 1))
    for tokens, targets, mask in zip(*(batch[n] for n in NAMES[:3]), strict=True):
        assert tokens[0] == START
        assert tokens[mask][1:].tolist() == targets[mask][:-1].tolist()
        assert not tokens[~mask].any() and not targets[~mask].any()
    assert not batch["source"][~batch["source_mask"]].any()


@pytest.mark.parametrize("text_len", [40, 100, 568, 2000])
def test_the_target_of_span_corruption_is_a_fifth_of_the_text(text_len):
    _, target_len = lengths(text_len)
    # Noise, a sentinel for every three tokens of it, both rounded, and the end symbol.
    assert abs(target_len - (0.15 * (1 + 1 / 3) * text_len + 1)) <= 0.5 * (1 + 1 / 3) + 0.5
    assert target_len <= 0.35 * (text_len + 1)


def test_the_target_of_span_corruption_is_shorter_than_that_of_reconstruction():
    short, whole = (batches_of(objective=o, text_len=100) for o in OBJECTIVES[:2])
    assert (short.target_len, whole.target_len) == (15 + 5 + 1, 100 + 1)
    for batches in (short, whole):
        assert batches(0)["mask"].sum(axis=1).tolist() == [batches.target_len] * 4


def test_reconstruction_hides_as_many_tokens_as_its_density_says():
    text, others = np.full(100_000, 7), np.arange(10, 60)
    found = masked(text, philox(1), 5, others, 0.15)
    hidden, random = found != 7, np.isin(found, others)
    assert set(np.unique(found)) <= {7, 5, *others}

    def bound(count, rate):  # four standard deviations of a binomial
        return 4 * math.sqrt(count * rate * (1 - rate))

    assert abs(hidden.sum() - 15_000) < bound(100_000, 0.15)
    assert abs(random.sum() - 0.1 * hidden.sum()) < bound(hidden.sum(), 0.1)
    each = np.bincount(found[random], minlength=60)[10:]
    expected = random.sum() / 50
    assert ((each - expected) ** 2 / expected).sum() < 85.4  # 49 degrees, one in a thousand


def test_reconstruction_hides_tokens_in_place_and_asks_for_all_of_them():
    batches = batches_of(objective="reconstruction", shuffle=False)
    hidden = 0
    for step in range(5):
        for row, (source, target) in enumerate(pairs_of(batches(step))):
            first = 2 + 20 * (4 * step + row)
            text = list(range(first, first + 20))
            assert target.tolist() == [*text, END] and len(source) == 21 and source[-1] == END
            hidden += (source != target).sum()
    assert abs(hidden - 60) < 4 * math.sqrt(400 * 0.15 * 0.85)


def test_noise_has_the_density_asked_for_to_the_token_in_every_text():
    batches = batches_of(noise_density=0.3, mean_span_len=2.0)
    for step in range(10):
        for _, target in pairs_of(batches(step)):
            assert np.isin(target[:-1], batches.sentinels, invert=True).sum() == 6
            assert np.isin(target, batches.sentinels).sum() == 3


def test_a_prefix_lm_splits_the_text_at_every_place_as_often():
    batches = batches_of(objective="prefix_lm", text_len=5, batch_size=8)
    cuts = collections.Counter()
    for step in range(300):
        for source, target in pairs_of(batches(step)):
            text = np.concatenate([source[:-1], target[:-1]])
            assert source[-1] == target[-1] == END
            assert (np.diff(text) == 1).all() and len(text) == 5
            cuts[len(source) - 1] += 1
    assert set(cuts) == {1, 2, 3, 4}
    assert sum((count - 600) ** 2 / 600 for count in cuts.values()) < 16.3  # 3 degrees


def test_a_language_model_has_no_source_but_its_end():
    batches = batches_of(objective="lm", shuffle=False)
    for row, (source, target) in enumerate(pairs_of(batches(0))):
        assert source.tolist() == [END]
        assert target.tolist() == [*range(2 + 20 * row, 22 + 20 * row), END]


@each_objective
def test_a_batch_depends_on_seed_and_step_alone(objective):
    batches, again, other = (batches_of(objective=objective, seed=seed) for seed in (3, 3, 4))
    backwards = {step: again(step) for step in reversed(range(12))}
    for step in range(12):
        for name in NAMES:
            np.testing.assert_array_equal(batches(step)[name], backwards[step][name])
    assert any((batches(0)[name] != other(0)[name]).any() for name in NAMES)


def test_each_epoch_has_every_text_once_in_an_order_and_with_noise_of_its_own():
    batches = batches_of(text_len=40, batch_size=5, seed=5)
    epochs = []
    for epoch in range(3):
        pairs = [pair for step in (2 * epoch, 2 * epoch + 1) for pair in pairs_of(batches(step))]
        epochs.append({int(source[0]): source.tolist() for source, _ in pairs})
    assert all(sorted(epoch) == list(range(2, 402, 40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for one, two in itertools.combinations(epochs, 2):
        # Six tokens in two spans are 5 divisions, and the 34 others 33: one in 165 is met again.
        assert sum(one[text] != two[text] for text in one) >= 9
    assert [batches.epoch(step) for step in (0, 1, 4)] == [0, 0.5, 2]


def test_an_evaluation_meets_every_text_once_and_ends_in_padding():
    for objective in OBJECTIVES:
        batches = batches_of(objective=objective, batch_size=6, shuffle=False)
        assert batches.num_batches == 4
        whole = [batches(step) for step in range(4)]
        assert sum(batch["mask"].any(axis=1).sum() for batch in whole) == 20
        for name in NAMES:
            assert not whole[-1][name][2:].any()
        with pytest.raises(ValueError, match="a step below 4"):
            batches(4)


@each_objective
@pytest.mark.parametrize("rows", [[0, 1, 2], [3], [3, 1]])
def test_some_rows_of_a_batch_are_those_of_the_whole(objective, rows):
    rows = np.array(rows)
    for shuffle in (True, False):
        batches = batches_of(objective=objective, shuffle=shuffle)
        whole, part = batches(1), batches(1, rows)
        for name in NAMES:
            np.testing.assert_array_equal(part[name], whole[name][rows])


def test_stacked_steps_and_a_grain_dataset_are_the_steps():
    batches, rows = batches_of(seed=2), np.array([1, 2])
    stacked, dataset = batches.stack(1, 6, rows), batches.to_grain(rows)
    for name in NAMES:
        steps = np.stack([batches(step, rows)[name] for step in range(1, 7)])
        np.testing.assert_array_equal(stacked[name], steps)
        np.testing.assert_array_equal(dataset[3][name], steps[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1, came 0"),
        ({"text_len": 1}, "text_len >= 2, came 1"),
        ({"mean_span_len": 0.5}, "mean_span_len >= 1, came 0.5"),
        ({"noise_density": 1.0}, "wanted 0 < noise_density < 1, came 1.0"),
        ({"seed": -1}, "seed >= 0, came -1"),
        ({"batch_size": 21}, "at least 21 texts of 20 tokens, came 405 tokens, 20 texts; give"),
        ({"text_len": 100, "sentinels": [900, 901]}, "wanted 5 sentinels, one for each span"),
        ({"sentinels": [900, 900]}, "wanted sentinels that differ"),
        ({"sentinels": [1000]}, r"wanted sentinels in \[0, 1000\), came 1000 to 1000"),
        ({"sentinels": [400]}, "wanted a text without sentinels, came id 400 in it"),
        ({"vocab_size": 300}, "wanted ids of text below vocab_size=300, came 406"),
        ({"vocab_size": 407}, "wanted a text without sentinels, came id 406 in it"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        batches_of(**settings)


def test_a_source_too_short_for_any_text_is_refused():
    with pytest.raises(ValueError, match="a source of at least 3 tokens, came 2"):
        longest_text(2)
