"""Translators compared on real sentences, here on numbers in words."""

import gzip
import json
import pathlib

import pytest
from num2words import num2words

from experiments import attention_maps, multi30k


@pytest.fixture
def folder(tmp_path):
    """A folder like Multi30k: short sentences and long ones."""
    counts, first = {"train": 70, "val": 4, "test_2016_flickr": 6}, 1000
    for part, count in counts.items():
        numbers = [number * 7919 % 10**6 for number in range(first, first + count)]
        first += count
        for language in multi30k.PAIR:
            sentences = [num2words(number, lang=language) for number in numbers]
            text = "\n".join(sentences) + "\n"
            (tmp_path / f"{part}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


@pytest.mark.slow
def test_translators_are_trained_scored_and_drawn(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(multi30k, "DRAWS", 3)
    # Two updates teach nothing, and sacrebleu's bootstrap fails where chrF is 0 in some draws.
    for module in (multi30k, attention_maps):
        monkeypatch.setattr(module, "translate_lines", lambda run, sources, how: list(sources))
    out = tmp_path / "out"
    command = [str(folder), "--out", str(out), "--steps", "2", "--only", "seq2seq", "transformer"]
    assert multi30k.main(command) == 0
    printed = capsys.readouterr().out
    for name, title in (("seq2seq", "LSTM encoder-decoder"), ("transformer", "Transformer")):
        told = json.loads((out / f"{name}.json").read_text())
        assert told["updates"] == 2 and told["wall_seconds"] > 0
        assert sum(group["sentences"] for group in told["by_length"]) == 6
        assert "tok:13a" in told["bleu"]["signature"]
        assert f"| {title} | {told['params']:,} |" in printed
    assert "Transformer" in (out / "alignments.svg").read_text()
    figure = (out / "bleu_by_length.svg").read_text()
    assert "Transformer" in figure and "BLEU" in figure
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    multi30k.main(command)  # what was measured is not done again
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*.json")}


def test_all_learn_the_same_pairs_in_the_same_order():
    settings = multi30k.experiments("folder")
    assert set(settings) == set(multi30k.NAMES)
    assert {one.train.num_steps for one in settings.values()} == {10 * 453}
    forwards = [{**vars(one.data), "reverse_source": False} for one in settings.values()]
    assert all(one == forwards[0] for one in forwards)


def test_sentences_are_chosen_by_place():
    written, references = multi30k.chosen([True, False, True], "abc", "xyz")
    assert (written, references) == (["a", "c"], ["x", "z"])


def test_without_the_sentences_nothing_is_trained(tmp_path, capsys):
    assert multi30k.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "test_2016_flickr.en.gz: no such file" in line
    assert not (tmp_path / "out").exists()


def test_readme_and_log_have_the_table_of_what_is_stored():
    root = pathlib.Path(__file__).parents[2]
    stored = root / "experiments" / "results" / "multi30k"
    found = [json.loads((stored / f"{name}.json").read_text()) for name in multi30k.NAMES]
    for path in (root / "README.md", root / "experiments" / "LOG.md"):
        assert multi30k.table(found) in path.read_text()
