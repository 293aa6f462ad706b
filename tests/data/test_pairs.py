"""A few settings give the same batches of pairs each time, and a record of what they are."""

import json
import pathlib

import numpy as np
import pytest

from lineage_jax.data import PairsData, load_pairs, train_bpe

MULTI30K = pathlib.Path(__file__).parents[3] / "shared" / "data" / "multi30k"
SMALL = {"batch_size": 4, "heldout_fraction": 0.2}


@pytest.fixture
def files(tmp_path):
    """Forty pairs in two files, as settings."""
    source = [f"The number {i} is told here." for i in range(40)]
    target = [f"Hier steht die Nummer-{i}, ja." for i in range(40)]
    for name, lines in (("source", source), ("target", target)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return {
        "source_path": str(tmp_path / "source"),
        "target_path": str(tmp_path / "target"),
        "cache_dir": str(tmp_path / "cache"),
    }


def said(data, batch):
    """The pairs of a batch as text."""
    rows = zip(batch["source"], batch["source_mask"], batch["targets"], batch["mask"], strict=True)
    return [
        (data.source_tokenizer.decode(s[sm]), data.target_tokenizer.decode(t[tm]))
        for s, sm, t, tm in rows
        if tm.any()
    ]


def heldout(data):
    batches = (data.heldout(step) for step in range(data.heldout.num_batches))
    return [pair for batch in batches for pair in said(data, batch)]


@pytest.mark.parametrize("tokenizer", ["words", "bytes", "bpe"])
def test_batches_decode_to_the_pairs_of_the_files(files, tokenizer):
    vocab_size = {"words": None, "bytes": None, "bpe": 300}[tokenizer]
    data = load_pairs(PairsData(tokenizer=tokenizer, vocab_size=vocab_size, **files, **SMALL))
    lines = [pathlib.Path(files[f"{side}_path"]).read_text().split("\n") for side in
             ("source", "target")]  # fmt: skip
    pairs = set(zip(*lines, strict=True)) - {("", "")}
    unknown = tokenizer == "words"  # the held-out numbers are no words of the training pairs
    if not unknown:
        assert heldout(data) == list(data.heldout_pairs)
    met = [pair for step in range(data.train.num_batches) for pair in said(data, data.train(step))]
    assert set(met) <= pairs - set(data.heldout_pairs) and len(set(met)) == len(met)
    assert data.train.num_rows + len(data.heldout_pairs) == 40
    assert data.name == "source to target"


def test_words_have_a_vocabulary_of_each_language_and_subwords_share_one(files):
    words = load_pairs(PairsData(**files, **SMALL))
    assert words.source_tokenizer.digest != words.target_tokenizer.digest
    assert (words.source_vocab_size, words.vocab_size) == (
        words.source_tokenizer.vocab_size, words.target_tokenizer.vocab_size
    )  # fmt: skip
    few = load_pairs(PairsData(vocab_size=10, **files, **SMALL))
    assert (few.source_vocab_size, few.vocab_size) == (10, 10)
    bpe = load_pairs(PairsData(tokenizer="bpe", vocab_size=280, **files, **SMALL))
    assert bpe.source_tokenizer is bpe.target_tokenizer
    lines = [pathlib.Path(files[f"{side}_path"]).read_text().splitlines() for side in
             ("source", "target")]  # fmt: skip
    held = set(bpe.heldout_pairs)
    train = [pair for pair in zip(*lines, strict=True) if pair not in held]
    both = [text for side in zip(*train, strict=True) for text in side]
    assert bpe.target_tokenizer.digest == train_bpe(both, 280).digest


def test_vocabularies_hold_no_word_of_the_held_out_pairs_alone(files):
    data = load_pairs(PairsData(**files, **SMALL))
    assert all("<unk>" in source and "<unk>" in target for source, target in heldout(data))


def test_the_decoder_begins_with_the_end_symbol_and_ends_before_it(files):
    data = load_pairs(PairsData(tokenizer="bytes", **files, **SMALL))
    batch = data.train(0)
    end = data.target_tokenizer.end_of_text
    assert (batch["tokens"][:, 0] == end).all()
    np.testing.assert_array_equal(batch["tokens"][:, 1:][batch["mask"][:, 1:]],
                                  batch["targets"][:, :-1][batch["mask"][:, 1:]])  # fmt: skip
    last = batch["mask"].sum(axis=1) - 1
    assert (batch["targets"][np.arange(4), last] == end).all()


def test_a_reversed_source_is_the_source_last_word_first_and_its_end_still_last(files):
    forward, backward = (
        load_pairs(PairsData(reverse_source=reverse, **files, **SMALL)) for reverse in (False, True)
    )
    one, two = forward.heldout(0), backward.heldout(0)
    np.testing.assert_array_equal(one["targets"], two["targets"])
    assert not np.array_equal(one["source"], two["source"])
    for row, other, mask in zip(one["source"], two["source"], one["source_mask"], strict=True):
        words = row[mask][:-1]
        assert other[mask].tolist() == [*words[::-1], row[mask][-1]]
    assert forward.digest != backward.digest


def test_held_out_files_are_evaluated_on_and_nothing_else_is_held_out(files, tmp_path):
    (tmp_path / "hs").write_text("The number 3\nis told\n")
    (tmp_path / "ht").write_text("Hier steht\ndie ja\n")
    more = {
        "heldout_source_path": str(tmp_path / "hs"),
        "heldout_target_path": str(tmp_path / "ht"),
    }
    data = load_pairs(PairsData(**files, **more, **SMALL))
    assert data.train.num_rows == 40
    assert data.heldout_pairs == (("The number 3", "Hier steht"), ("is told", "die ja"))
    assert heldout(data) == list(data.heldout_pairs)


def test_longer_pairs_are_left_out_counted_and_not_among_the_held_out_texts(files):
    full = load_pairs(PairsData(tokenizer="bytes", **files, **SMALL))
    short = load_pairs(PairsData(tokenizer="bytes", source_len=27, **files, **SMALL))
    assert full.left_out == 0
    assert short.left_out == 30  # those whose number has two digits
    assert heldout(short) == list(short.heldout_pairs)
    assert short.heldout_pairs == tuple(p for p in full.heldout_pairs if len(p[0]) < 27)
    record = short.provenance()
    assert record["train"]["left_out"] + record["heldout"]["left_out"] == 30


def test_without_files_it_is_numbers_in_words_of_which_none_is_on_both_sides(tmp_path):
    settings = {"num_pairs": 300, "cache_dir": str(tmp_path), "max_digits": 5, **SMALL}
    data = load_pairs(PairsData(**settings))
    assert data.name == "numbers.en to numbers.fr"
    assert heldout(data) == list(data.heldout_pairs)
    steps = range(3 * data.train.num_batches)
    met = {pair for step in steps for pair in said(data, data.train(step))}
    assert not met & set(data.heldout_pairs)
    assert data.train.num_rows + data.heldout.num_rows == 300
    assert data.train.lengths.tolist() == [[51, 51]]
    buckets = load_pairs(PairsData(buckets=3, **settings))
    assert len(buckets.train.lengths) == 3 and buckets.train.lengths[0].max() < 51
    dates = load_pairs(PairsData(kind="dates", target_language="de", **settings))
    assert any("März" in target for _, target in dates.heldout_pairs)


def test_what_is_kept_gives_the_same_again_and_another_seed_another_order(files):
    config = PairsData(tokenizer="bpe", vocab_size=270, **files, **SMALL)
    one, two = load_pairs(config), load_pairs(config)
    assert one.provenance() == two.provenance() == json.loads(json.dumps(one.provenance()))
    np.testing.assert_array_equal(one.train(5)["tokens"], two.train(5)["tokens"])
    other = load_pairs(PairsData(tokenizer="bpe", vocab_size=270, seed=1, **files, **SMALL))
    assert other.digest == one.digest
    assert not np.array_equal(other.train(5)["tokens"], one.train(5)["tokens"])


def test_a_tokenizer_file_serves_both_sides(files, tmp_path):
    train_bpe(["The number is told here."], 270).save(tmp_path / "t")
    data = load_pairs(PairsData(tokenizer=str(tmp_path / "t"), **files, **SMALL))
    assert data.vocab_size == data.source_vocab_size <= 270
    with pytest.raises(ValueError, match=r"more than --data\.vocab-size 100"):
        load_pairs(PairsData(tokenizer="bytes", vocab_size=100, **files, **SMALL))
    with pytest.raises(FileNotFoundError, match="wrods: no such tokenizer"):
        load_pairs(PairsData(tokenizer="wrods", **files, **SMALL))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_path": "a"}, "came one of them"),
        ({"heldout_target_path": "a"}, "heldout-target-path, came one of them"),
        ({"heldout_source_path": "a", "heldout_target_path": "b"}, "to train on"),
        ({"heldout_fraction": 1.0}, "0 < heldout_fraction < 1"),
        ({"min_digits": 0}, "1 <= min_digits <= max_digits <= 18, came 0 and 9"),
        ({"max_digits": 2}, "came 3 and 2"),
        ({"max_digits": 19}, "came 3 and 19"),
        ({"buckets": 0}, "buckets >= 1"),
        ({"source_len": 0}, "source_len >= 1"),
        ({"batch_size": -2}, "batch_size >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        PairsData(**settings)


@pytest.mark.skipif(not MULTI30K.exists(), reason="Multi30k is not here")
def test_multi30k_is_read_in_buckets_that_halve_its_padding(tmp_path):
    files = {
        f"{prefix}{side}_path": str(MULTI30K / f"{part}.{language}.gz")
        for prefix, part in (("", "val"), ("heldout_", "test_2016_flickr"))
        for side, language in (("source", "en"), ("target", "de"))
    }
    one, four = (
        load_pairs(PairsData(buckets=k, batch_size=32, cache_dir=str(tmp_path), **files))
        for k in (1, 4)
    )
    assert (one.train.num_rows, one.left_out, len(one.heldout_pairs)) == (1014, 0, 1000)

    def padding(data):
        batches = [data.train(step) for step in range(data.train.num_batches)]
        return np.mean([1 - batch["mask"].mean() for batch in batches])

    assert padding(four) < 0.7 * padding(one)


def test_every_setting_is_an_option_of_the_command_line_with_its_help(capsys):
    import tyro

    parsed = tyro.cli(PairsData, args=["--kind", "dates", "--source-len", "8", "--buckets", "3"])
    assert parsed == PairsData(kind="dates", source_len=8, buckets=3)
    with pytest.raises(SystemExit):
        tyro.cli(PairsData, args=["--help"])
    assert "Longer pairs are left out" in " ".join(capsys.readouterr().out.split())
