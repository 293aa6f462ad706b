"""Tables of texts and labels are read as they stand, and what is amiss is named by its line."""

import gzip

import pytest

from lineage_jax.data.labelled_text import (
    Example,
    LabelledText,
    label_ids,
    read_labelled,
    split_labelled,
)

CSV = 'label,text,other\ngood,"fine, ""very"" fine",a\nbad,"two\nlines",b\n'
TWO = "two\r\nlines"
TSV = 'text\tlabel\n"it\tgood\nis" so\tbad\n'
JSONL = '{"text": "yes", "label": 1}\n\n{"text": "no", "label": 0, "more": []}\n'


def write(folder, name, content):
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def rows(text):
    return [(*example.texts, example.label) for example in text.examples]


def text_of(*contents):
    return LabelledText("t", tuple(Example(f"t:{i}", *one) for i, one in enumerate(contents)))


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", CSV, [('fine, "very" fine', "good"), ("two\nlines", "bad")]),
        ("a.csv", "\ufeff" + CSV, [('fine, "very" fine', "good"), ("two\nlines", "bad")]),
        ("a.csv", CSV.replace("\n", "\r\n"), [('fine, "very" fine', "good"), (TWO, "bad")]),
        ("a.tsv", TSV, [('"it', "good"), ('is" so', "bad")]),
        ("a.jsonl", JSONL, [("yes", "1"), ("no", "0")]),
    ],
)  # fmt: skip
def test_each_kind_of_table_is_its_texts_and_labels(tmp_path, name, content, expected, end):
    found = read_labelled(write(tmp_path, name + end, content))
    assert rows(found) == expected
    assert found.name == name + end and found.labels == tuple(sorted(row[-1] for row in expected))


def test_columns_have_the_names_that_are_asked_for_and_two_texts_stay_in_order(tmp_path):
    path = write(tmp_path, "a.csv", CSV)
    found = read_labelled(path, text="other", second="text", label="label")
    assert rows(found)[0] == ("a", 'fine, "very" fine', "good")
    assert [document.text for document in found.corpus.documents][2:] == ["b", "two\nlines"]
    assert found.examples[1].name == "a.csv:4"  # where it ends


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", r"a\.txt: wanted a \.csv, \.tsv, \.jsonl file"),
        ("a.csv", "text,label\na,b\nc\n", r"a\.csv:3: wanted a text under 'label'.* came None"),
        ("a.csv", "text,label\na,b,c\n", r"a\.csv:2: wanted 2 fields, .* came 1 more"),
        ("a.csv", "words,label\na,b\n", r"a\.csv:2: .* 'text' .* columns \['label', 'words'\]"),
        ("a.csv", 'text,label\n"a"b,c\n', r"a\.csv:2: wanted a \.csv table"),
        ("a.csv", "text,label\n  ,c\n", r"a\.csv:2: wanted a text under 'text'"),
        ("a.csv", "text,label\na,c\nb,c\n", r"two labels or more under 'label', came only 'c'"),
        ("a.csv", "text,label\n", "came no rows"),
        ("a.csv", b"text,label\na,\xff\n", r"a\.csv:2: wanted UTF-8 text, came byte 0xff"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text', r"a\.jsonl:2: wanted a JSON object"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: wanted a JSON object, came list"),
        ("a.jsonl", '{"text": 1.5, "label": 0}\n', r"a\.jsonl:1: wanted a text under 'text'"),
    ],
)  # fmt: skip
def test_what_is_amiss_is_named_by_file_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_labelled(write(tmp_path, name, content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"b\.csv: no such file"):
        read_labelled(tmp_path / "b.csv")


def test_the_same_texts_are_never_on_both_sides_and_more_examples_move_none():
    examples = [((f"text {i // 2}",), f"label {i % 2}") for i in range(200)]
    train, heldout = split_labelled(text_of(*examples), 0.3)
    sides = [{example.texts for example in side.examples} for side in (train, heldout)]
    assert not sides[0] & sides[1] and sum(map(len, sides)) == 100
    assert 0.15 < len(sides[1]) / 100 < 0.45
    more = split_labelled(text_of(*examples, *[((f"new {i}",), "x") for i in range(50)]), 0.3)
    assert {example.texts for example in more[1].examples} >= sides[1]
    with pytest.raises(ValueError, match="too few examples, 1, to hold out"):
        split_labelled(text_of((("a",), "b")), 0.3)


def test_labels_become_their_places_and_one_that_is_new_is_named_by_its_line():
    text = text_of((("a",), "x"), (("b",), "y"))
    assert label_ids(("w", "y", "x"), text) == [2, 1]
    with pytest.raises(ValueError, match=r"t:1: wanted one of the labels .* x, came 'y'"):
        label_ids(("x",), text)


def test_the_digest_is_of_texts_labels_and_their_order():
    one, two = (("a", "b"), "x"), (("c", "d"), "y")
    texts = [text_of(one, two), text_of(two, one), text_of((("a", "b"), "y"), two)]
    assert len({text.digest for text in texts}) == 3
    assert LabelledText("other", texts[0].examples).digest == texts[0].digest
