"""Text is gathered whole, in order, and refused by name; held-out text is never trained on."""

import gzip
import sys
import types

import pytest

from lineage_jax.data import Corpus, Document, read_huggingface, read_text, split_documents
from lineage_jax.data.sources import is_held_out


def corpus(*texts):
    return Corpus("c", tuple(Document(f"d{i}", text) for i, text in enumerate(texts)))


def test_a_file_is_one_document_byte_for_byte(tmp_path):
    text = "First line\r\n\n  second: naïve 文字 🎈\t\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_text(tmp_path / "a.txt").documents == (Document("a.txt", text),)


def test_a_gzipped_file_reads_as_the_file(tmp_path):
    (tmp_path / "a.md.gz").write_bytes(gzip.compress("hé\n".encode()))
    assert read_text(tmp_path / "a.md.gz").documents[0].text == "hé\n"


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "sub/c.py", "a.md", ".git/no.txt", "sub/.no.md", "no.png", "blank.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(" \n" if name == "blank.txt" else name)
    names = [document.name for document in read_text(tmp_path).documents]
    assert names == ["a.md", "b.txt", "sub/c.py"]


def test_each_json_line_is_a_document(tmp_path):
    lines = '{"text": "x\u2028y", "q": "no"}\n\n{"text": "z"}\n'  # U+2028 ends no JSON line
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    expected = (Document("a.jsonl:1", "x\u2028y"), Document("a.jsonl:3", "z"))
    assert read_text(tmp_path / "a.jsonl").documents == expected
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"q": "w"}'))
    assert read_text(tmp_path / "b.jsonl.gz", column="q").documents[0].text == "w"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: wanted text, but it is empty"),
        ("a.txt", b" \n\t\n", r"a\.txt: wanted text, but it is empty or blank"),
        ("a.txt", b"ab\x00c", r"a\.txt: .*binary data \(a NUL at byte 2\)"),
        ("a.txt", b"one\ntwo\nth\xffee", r"a\.txt:3: .*byte 0xff at offset 10"),
        ("a.txt", "é".encode("utf-16"), r"a\.txt: .*binary data"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: wanted a whole gzip file"),
        (
            "a.txt.gz",
            gzip.compress(b"long enough " * 99, mtime=0)[:-9],
            r"a\.txt\.gz: wanted a whole",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl:2: wanted a JSON object"),
        ("a.jsonl", b'{"question": "x"}', r"a\.jsonl:1: .*'text'.*came \['question'\]"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: wanted a string under 'text'"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: wanted a string under 'text'.*came list"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: not valid Unicode"),
    ],
)
def test_what_is_not_text_is_refused_in_one_line_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(
            ValueError, match=message if path.is_file() else "wanted|not valid"
        ) as e:
            read_text(path)
        assert "\n" not in str(e.value)


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"wanted a folder with \.txt"):
        read_text(tmp_path)


def test_the_digest_tells_names_texts_and_their_borders_apart():
    digests = {
        Corpus("c", documents).digest
        for documents in (
            (Document("a", "bc"),),
            (Document("ab", "c"),),
            (Document("a", "b"), Document("", "c")),
            (Document("a", "b"), Document("c", "")),
        )
    }
    assert len(digests) == 4
    assert Corpus("other", (Document("a", "bc"),)).digest in digests


def test_adding_documents_moves_no_other_to_the_other_side():
    texts = [f"text number {i}" for i in range(200)]
    few, many = corpus(*texts[:100]), corpus(*texts[::-1])
    for before, after in zip(split_documents(few, 0.2), split_documents(many, 0.2), strict=True):
        assert {d.text for d in before.documents} <= {d.text for d in after.documents}
    train, heldout = split_documents(many, 0.2)
    assert len(train.documents) + len(heldout.documents) == 200
    assert 20 <= len(heldout.documents) <= 60  # 40 expected, standard deviation 5.7


def test_two_copies_of_a_text_never_stand_on_both_sides():
    train, heldout = split_documents(corpus(*(f"text {i % 50}" for i in range(100))), 0.3)
    assert not {d.text for d in train.documents} & {d.text for d in heldout.documents}


def test_of_a_single_text_the_last_lines_are_held_out():
    text = "".join(f"line {i}\n" for i in range(100))
    train, heldout = split_documents(corpus(text), 0.1)
    (first,), (last,) = train.documents, heldout.documents
    assert first.text + last.text == text
    assert last.text.startswith("line ") and 0.08 < len(last.text) / len(text) <= 0.1
    assert first.name != last.name


def test_a_text_of_one_line_is_cut_within_it():
    train, heldout = split_documents(corpus("0123456789\n"), 0.2)
    assert (train.documents[0].text, heldout.documents[0].text) == ("012345678", "9\n")


def test_few_documents_that_fall_on_one_side_are_cut_as_one_text():
    texts = ["cccc\n" * 10, "dddd\n" * 10, "eeee\n" * 2]
    assert not any(is_held_out(text.encode(), 0.3) for text in texts)
    train, heldout = split_documents(corpus(*texts), 0.3)  # of 110 characters, after the 77th
    assert [d.text for d in train.documents] == [texts[0], "dddd\n" * 6]
    assert [d.text for d in heldout.documents] == ["dddd\n" * 4, texts[2]]


def test_too_little_text_and_fractions_beyond_zero_and_one_are_refused():
    with pytest.raises(ValueError, match="too short to hold out"):
        split_documents(corpus("x"), 0.1)
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="0 < heldout_fraction < 1"):
            split_documents(corpus("some", "text"), fraction)


def test_a_hugging_face_column_becomes_documents(monkeypatch):
    class Rows(dict):
        column_names = ("text", "label")

    def load_dataset(*args, **kwargs):
        assert (args, kwargs) == (("owner/set", "config"), {"split": "test"})
        return Rows(text=["one", "", "two"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    read = read_huggingface("owner/set:config", split="test")
    assert [document.text for document in read.documents] == ["one", "two"]
    with pytest.raises(ValueError, match=r"wanted a column 'body'.*'label'"):
        read_huggingface("owner/set:config", split="test", column="body")


def test_without_the_datasets_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'lineage-jax\[hf\]'"):
        read_huggingface("owner/set")
