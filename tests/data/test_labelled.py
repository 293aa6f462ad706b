"""A few settings give the same labelled batches each time, and a record of what they are."""

import collections
import json
import re

import numpy as np
import pytest

from lineage_jax.data import LabelledData, Marks, load_labelled, train_bpe
from lineage_jax.data.labelled import read_labels
from lineage_jax.data.snippets import MIN_LENGTH, PACKAGES, functions, snippets

SMALL = {"batch_size": 4, "seq_len": 40}


@pytest.fixture
def files(tmp_path):
    """Sixty examples in a table, as settings."""
    lines = ["text,second,label", *(f"text number {i},and {i},kind {i % 3}" for i in range(60))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    return {"path": str(tmp_path / "a.csv"), "cache_dir": str(tmp_path / "cache")}


def said(data, batch):
    """The text, or texts, and label of each row of a batch."""
    rows = zip(batch["tokens"], batch["mask"], batch["types"], batch["label"], strict=True)
    decode = data.tokenizer.decode
    return [
        (*(decode(t[m & (p == part)]) for part in range(1 + p.max())), data.labels[label])
        for t, m, p, label in rows
        if m.any()
    ]


def whole_pass(data):
    batches = (data.heldout(step) for step in range(data.heldout.num_batches))
    return [row for batch in batches for row in said(data, batch)]


def met_in_training(data, num_steps=30):
    return {row for step in range(num_steps) for row in said(data, data.train(step))}


@pytest.mark.parametrize("tokenizer", ["words", "bytes", "bpe"])
def test_batches_decode_to_the_texts_and_labels_of_the_file(files, tokenizer):
    vocab_size = {"words": None, "bytes": None, "bpe": 300}[tokenizer]
    data = load_labelled(LabelledData(tokenizer=tokenizer, vocab_size=vocab_size, **files, **SMALL))
    assert data.labels == ("kind 0", "kind 1", "kind 2") and data.name == "a.csv"
    known = {(f"text number {i}", f"kind {i % 3}") for i in range(60)}
    kept = [(*example.texts, example.label) for example in data.heldout_text.examples]
    if tokenizer != "words":  # whose held-out numbers are no words of the training texts
        assert whole_pass(data) == kept
    assert met_in_training(data) == known - set(kept)
    assert data.train.num_rows + data.heldout.num_rows == 60


def test_two_texts_are_two_parts_of_a_row(files):
    data = load_labelled(LabelledData(second_column="second", **files, **SMALL))
    first = data.heldout_text.examples[0]
    assert said(data, data.heldout(0))[0] == (*first.texts, first.label)
    assert re.fullmatch(r"text number (\d+)\+and \1", "+".join(first.texts))


def test_a_model_that_was_trained_before_brings_its_tokenizer_and_its_marks(files, tmp_path):
    theirs = train_bpe(["text number 0"], 270)

    def marks(tokenizer):
        assert tokenizer is theirs
        return Marks(start=300, between=301, end=302)

    data = load_labelled(LabelledData(**files, **SMALL), theirs, marks)
    assert data.tokenizer is theirs
    batch = data.train(0)
    ends = batch["mask"].sum(-1) - 1
    assert (batch["tokens"][:, 0] == 300).all()
    assert (batch["tokens"][np.arange(4), ends] == 302).all()
    theirs.save(tmp_path / "theirs")
    named = load_labelled(LabelledData(tokenizer=str(tmp_path / "theirs"), **files, **SMALL))
    assert named.tokenizer.digest == theirs.digest
    with pytest.raises(ValueError, match=r"has 257 tokens, more than --data\.vocab-size 100"):
        load_labelled(LabelledData(vocab_size=100, **files, **SMALL))


def test_the_seed_draws_which_examples_are_trained_on_and_never_a_held_out_one(files):
    def trained_on(**settings):
        data = load_labelled(LabelledData(**files, **SMALL, **settings))
        met = met_in_training(data)
        assert not set(whole_pass(data)) & met
        return met

    few, again, other = (trained_on(num_train=12, seed=seed) for seed in (0, 0, 1))
    assert len(few) == len(other) == 12 and few == again != other
    assert few < trained_on(num_train=20)  # more examples begin with the fewer
    with pytest.raises(ValueError, match=r"wanted 61 examples to train on, have \d+"):
        load_labelled(LabelledData(num_train=61, **files, **SMALL))


def test_a_held_out_file_is_evaluated_on_and_may_hold_no_new_label(files, tmp_path):
    lines = ['{"text": "x", "label": "kind 1"}', '{"text": "y", "label": "kind 0"}']
    (tmp_path / "h.jsonl").write_text("\n".join(lines))
    heldout = {"heldout_path": str(tmp_path / "h.jsonl")}
    data = load_labelled(LabelledData(**files, **heldout, **SMALL))
    assert read_labels(LabelledData(**files, **heldout)) == data.labels
    assert data.train.num_rows == 60 and whole_pass(data) == [("x", "kind 1"), ("y", "kind 0")]
    (tmp_path / "h.jsonl").write_text(lines[0] + '\n{"text": "y", "label": 7}')
    with pytest.raises(ValueError, match=r"h\.jsonl:2: wanted one of the labels .* came '7'"):
        load_labelled(LabelledData(**files, **heldout, **SMALL))


def test_the_same_settings_give_the_same_again_and_a_record_of_it(files):
    config = LabelledData(tokenizer="bpe", vocab_size=270, **files, **SMALL)
    one, two = load_labelled(config), load_labelled(config)
    assert one.provenance() == two.provenance() == json.loads(json.dumps(one.provenance()))
    np.testing.assert_array_equal(one.train(5)["tokens"], two.train(5)["tokens"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heldout_path": "a"}, r"wanted --data\.path"),
        ({"second_column": "a"}, r"wanted --data\.path"),
        ({"heldout_fraction": 1.0}, "0 < heldout_fraction < 1"),
        ({"num_train": 0}, "num_train >= 1"),
        ({"seq_len": 2}, "seq_len >= 3"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        LabelledData(**settings)


@pytest.fixture(scope="module")
def built_in():
    return snippets()


def test_without_a_file_it_is_functions_of_eight_packages_as_many_of_each(built_in):
    counts = collections.Counter(example.label for example in built_in.examples)
    assert built_in.labels == tuple(counts) == PACKAGES
    assert len(set(counts.values())) == 1 and counts["xml"] >= 100
    assert len({example.texts for example in built_in.examples}) == len(built_in.examples)
    assert built_in.digest == snippets().digest


def test_no_snippet_says_its_label_and_each_is_a_function_whole(built_in):
    for example in built_in.examples:
        (text,) = example.texts
        assert not any(name in text.lower() for name in PACKAGES), example.name
        assert text.startswith(("def ", "async def ")) and len(text) >= MIN_LENGTH


SOURCE = """class A:
    @property
    def one(self):
        '''{}'''
# is not here

\x0cdef two():
    def inner():
        '''{}'''
"""


def test_functions_are_those_of_modules_and_classes_and_not_those_within_others():
    found = functions(SOURCE.format("Email " * 40, "x" * 200))
    assert [line for line, _ in found] == [3, 7]
    one, two = (text for _, text in found)
    assert one == "def one(self):\n    '''" + "package " * 40 + "'''"
    assert two.startswith("def two():\n    def inner") and two.endswith("x'''")
