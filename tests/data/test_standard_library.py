"""The built-in corpus is real text, the same each time, and says nothing twice."""

import time

import pytest

from lineage_jax.data import python_text, split_documents
from lineage_jax.data import standard_library as lib
from lineage_jax.data.sources import Document


@pytest.fixture(scope="module")
def corpus():
    return python_text()


def test_it_is_gathered_the_same_twice_within_three_seconds(corpus):
    start = time.perf_counter()
    again = python_text()
    assert time.perf_counter() - start < 3
    assert again.digest == corpus.digest


def test_it_is_megabytes_of_topics_and_modules(corpus):
    names = {document.name for document in corpus.documents}
    assert corpus.num_bytes > 4e6
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py", "topics/compound"} <= names
    assert [d.name for d in corpus.documents] == sorted(names)


def test_tests_tables_and_installed_packages_are_left_out(corpus):
    for document in corpus.documents:
        parts = document.name.split("/")
        assert not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(parts)
        assert not document.name.startswith(("stdlib/_sysconfigdata", "stdlib/encodings/cp"))
    assert "stdlib/pydoc_data/topics.py" not in {d.name for d in corpus.documents}


def test_a_topic_that_is_a_section_of_another_is_left_out(corpus):
    names = {document.name for document in corpus.documents}
    assert not {"topics/for", "topics/while", "topics/try"} & names  # of "compound"


def test_hardly_any_held_out_paragraph_stands_in_the_training_text(corpus):
    train, heldout = split_documents(corpus, 0.05)

    def paragraphs(side):
        texts = (p.strip() for d in side.documents for p in d.text.split("\n\n"))
        return [text for text in texts if len(text) > 100]

    seen = set(paragraphs(train))
    held = paragraphs(heldout)
    assert sum(len(p) for p in held if p in seen) < 0.02 * sum(map(len, held))


def test_what_mostly_repeats_a_larger_document_is_dropped_and_nothing_else():
    whole = Document("whole", "one one\n\ntwo two\n\nthree")
    part = Document("part", "two two\n\nnew")
    new = Document("new", "three\n\nentirely different words")
    assert lib._without_repeats([part, new, whole, Document("empty", "")]) == (new, whole)


def test_a_python_without_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(lib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="wanted the standard library's source"):
        python_text()


def test_strangers_in_the_library_folder_and_odd_encodings_are_left_out(monkeypatch, tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "argparse.py").write_text("# installed")
    (tmp_path / "stranger.py").write_text("# not Python's own")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "module.py").write_text("# nor this")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "scanner.py").write_bytes(b"# latin \xe9")
    (tmp_path / "argparse.py").write_text("# Python's own")
    monkeypatch.setattr(lib.sysconfig, "get_path", lambda name: str(tmp_path))
    modules = [d.name for d in python_text().documents if d.name.startswith("stdlib/")]
    assert modules == ["stdlib/argparse.py"]
