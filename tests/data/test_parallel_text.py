"""Lines that belong together stay together, and files that do not match are refused by line."""

import gzip

import pytest

from lineage_jax.data import Corpus, Document, ParallelText, read_parallel_text, split_pairs


def write(folder, source, target):
    """Two files of these bytes, the second gzipped."""
    (folder / "a.en").write_bytes(source)
    (folder / "a.de.gz").write_bytes(gzip.compress(target))
    return folder / "a.en", folder / "a.de.gz"


def texts(corpus):
    return [document.text for document in corpus.documents]


def pairs_of(sources, targets):
    source, target = (
        Corpus(name, tuple(Document(f"{name}:{i}", text) for i, text in enumerate(side)))
        for name, side in (("s", sources), ("t", targets))
    )
    return ParallelText(source, target)


@pytest.mark.parametrize("end", [b"\n", b"", b"\r\n"])
def test_line_by_line_two_files_are_pairs(tmp_path, end):
    line = end or b"\n"
    paths = write(tmp_path, b"one" + line + b"two\xe2\x80\xa8!" + end, b"eins\nzw\xc3\xb6i")
    pairs = read_parallel_text(*paths)
    assert texts(pairs.source) == ["one", "two\u2028!"]  # U+2028 ends no line of a file
    assert texts(pairs.target) == ["eins", "zwöi"]
    assert pairs.name == "a.en to a.de.gz"
    assert pairs.target.documents[1].name == "a.de.gz:2"


def test_lines_that_are_blank_in_both_files_are_left_out(tmp_path):
    pairs = read_parallel_text(*write(tmp_path, b"one\n\ntwo\n", b"eins\n \nzwei\n"))
    assert (texts(pairs.source), texts(pairs.target)) == (["one", "two"], ["eins", "zwei"])
    assert pairs.source.documents[1].name == "a.en:3"


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (b"1\n2\n3\n", b"1\n2\n", r"a\.en:3: wanted a line 3 in .*a\.de\.gz .* 3 and 2 came"),
        (b"1\n", b"1\n2\n3\n", r"a\.de\.gz:2: wanted a line 2 in .*a\.en .* 1 and 3 came"),
        (b"1\n\n3\n", b"1\n2\n3\n", r"a\.en:2: wanted the translation of line 2 of .*a\.de\.gz"),
        (b"1\n2\n", b"1\n \n", r"a\.de\.gz:2: wanted the translation of line 2 of .*a\.en"),
        (b"1\n\xff\n", b"1\n2\n", r"a\.en:2: wanted UTF-8 text, came byte 0xff"),
        (b"1\n2\n", b"1\n\xc3\n", r"a\.de\.gz:2: wanted UTF-8 text, came byte 0xc3"),
        (b"", b"1\n", r"a\.en: wanted text, but it is empty"),
        (b"1\n", b"\n\n", r"a\.de\.gz: wanted text, but it is empty or blank"),
    ],
)
def test_files_that_are_no_pairs_are_refused_in_one_line_that_names_it(
    tmp_path, source, target, message
):
    with pytest.raises(ValueError, match=message) as error:
        read_parallel_text(*write(tmp_path, source, target))
    assert "\n" not in str(error.value)


def test_a_missing_file_a_folder_and_json_are_refused(tmp_path):
    one, two = write(tmp_path, b"1\n", b"1\n")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file; check .*--data\.target"):
        read_parallel_text(one, tmp_path / "nowhere")
    (tmp_path / "b").mkdir()
    for name in ("x.txt", "y.txt"):
        (tmp_path / "b" / name).write_text("text")
    with pytest.raises(ValueError, match="wanted one text file with a sentence on each line"):
        read_parallel_text(tmp_path / "b", two)


def test_adding_pairs_moves_no_other_to_the_other_side():
    sources = [f"sentence {i}" for i in range(200)]
    few, many = pairs_of(sources[:100], sources[:100]), pairs_of(sources[::-1], sources[::-1])
    for before, after in zip(split_pairs(few, 0.2), split_pairs(many, 0.2), strict=True):
        assert set(texts(before.source)) <= set(texts(after.source))
        assert texts(after.source) == texts(after.target)
    train, heldout = split_pairs(many, 0.2)
    assert len(texts(train.source)) + len(texts(heldout.source)) == 200
    assert 20 <= len(texts(heldout.source)) <= 60  # 40 expected, standard deviation 5.7


def test_a_sentence_with_two_translations_is_wholly_on_one_side():
    sources = [f"sentence {i // 2}" for i in range(200)]
    train, heldout = split_pairs(pairs_of(sources, [f"Satz {i}" for i in range(200)]), 0.2)
    assert not set(texts(train.source)) & set(texts(heldout.source))


def test_too_few_pairs_to_split_are_refused():
    with pytest.raises(ValueError, match=r"too few pairs, 1, to hold out 0\.5"):
        split_pairs(pairs_of(["one"], ["eins"]), 0.5)
