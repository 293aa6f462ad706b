"""Each model learns its paper's pieces, and no text encodes to its special tokens."""

import json

import numpy as np
import pytest

from lineage_jax.data import train_tokenizer
from lineage_jax.data.sources import Corpus, Document
from lineage_jax.data.train_tokenizers import (
    BERT_TOKENS,
    T5_TOKENS,
    add_sentinels,
    train_cached,
    train_words,
)

WORDS = "the cat cats mat and dog barks returns defines standing".split()  # noqa: SIM905
MARKS = ("", "", ",", ".", ";", "\n")
DRAWN = np.random.default_rng(0).integers(0, (len(WORDS), len(MARKS)), (2000, 2))
TEXTS = ["".join(f" {WORDS[word]}{MARKS[mark]}" for word, mark in DRAWN), "x = x + x\n" * 20]
STRANGE = "naïve 文字 🎈\x00\x7f\r\n \t\u2028 <pad></s><unk> <extra_id_0>  \n\n  x"


def vocabulary(tokenizer):
    """Every token, special ones too, and its id."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer.content).get_vocab(with_added_tokens=True)


@pytest.fixture(scope="module")
def unigram():
    return train_tokenizer("unigram", TEXTS, 300)


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer("wordpiece", iter(TEXTS), 90)


@pytest.mark.parametrize("text", ["", "plain", STRANGE, "".join(map(chr, range(0x800)))])
def test_unigram_brings_any_text_back_exactly(unigram, text):
    ids = unigram.encode(text)
    assert unigram.decode(ids) == text
    assert not set(ids.tolist()) & {0, 1, 2}  # neither padding, end nor unknown


def test_unigram_finds_the_words_of_its_texts(unigram):
    assert {f"Ġ{word}" for word in WORDS} <= vocabulary(unigram).keys()
    assert len(unigram.encode(" the cat barks, and dog.")) == 7


def test_unigram_begins_with_t5_s_special_tokens(unigram):
    ids = vocabulary(unigram)
    assert [ids[name] for name in T5_TOKENS] == [0, 1, 2]
    assert unigram.end_of_text == 1 and unigram.vocab_size == len(ids) <= 300


def test_wordpiece_begins_with_bert_s_special_tokens_and_splits_words_as_bert_does(wordpiece):
    ids = vocabulary(wordpiece)
    assert [ids[name] for name in BERT_TOKENS] == [0, 1, 2, 3, 4]
    assert wordpiece.end_of_text == ids["[SEP]"]
    assert wordpiece.encode("the mat,cat").tolist() == [ids[p] for p in ("the", "mat", ",", "cat")]
    assert wordpiece.decode(wordpiece.encode("the  matin")) == "the matin"


def test_wordpiece_takes_the_longest_piece_that_fits(wordpiece):
    """Wu et al. 2016 and BERT: greedily from the left."""
    ids = vocabulary(wordpiece)
    for word in ("thesat", "returned", "matand", "catdefines"):
        rest, pieces = word, []
        while rest:
            prefix = "##" if pieces else ""
            fits = [n for n in range(len(rest), 0, -1) if prefix + rest[:n] in ids]
            pieces.append(ids[prefix + rest[: fits[0]]])
            rest = rest[fits[0] :]
        assert wordpiece.encode(word).tolist() == pieces


def test_wordpiece_knows_no_letter_that_it_has_not_seen(wordpiece):
    ids = vocabulary(wordpiece)
    assert wordpiece.encode("the 文").tolist() == [ids["the"], ids["[UNK]"]]


def test_no_text_encodes_to_a_special_token_of_wordpiece(wordpiece):
    ids = wordpiece.encode("[PAD] [CLS] the [SEP][MASK] cat")
    assert not set(ids.tolist()) & {vocabulary(wordpiece)[name] for name in BERT_TOKENS} - {1}


def test_words_are_split_at_spaces_hyphens_and_marks_and_come_back_exactly():
    text = "vingt-deux mille, a -- b  l'été-\tx"
    words = train_words([text], 100)
    names = {i: name for name, i in vocabulary(words).items()}
    pieces = [names[i] for i in words.encode(text).tolist()]
    assert pieces[:5] == [" vingt", "-deux", " mille", ",", " a"]
    assert words.decode(words.encode(text)) == text
    assert words.encode("deux vingt").tolist()[0] == vocabulary(words)["<unk>"]


def test_the_most_frequent_words_are_taken_and_the_rest_is_unknown():
    words = train_words(["a a a b b c", "c b a d"], 4)
    assert words.vocab_size == 4
    assert words.decode(words.encode("b c a")) == "b<unk> a"
    assert words.end_of_text == 0


def test_words_and_what_is_kept_of_them_are_the_same_each_time(tmp_path, monkeypatch):
    corpora = [Corpus("c", (Document("a", text),)) for text in TEXTS]
    fresh = train_words(iter(TEXTS), 50)
    assert train_cached("words", corpora, 50, tmp_path).digest == fresh.digest
    bpe = train_cached("bpe", corpora, 280, tmp_path)
    for name in ("train_words", "train_bpe"):
        monkeypatch.setattr(f"lineage_jax.data.train_tokenizers.{name}", None)
    assert train_cached("words", corpora, 50, tmp_path).digest == fresh.digest
    assert train_cached("bpe", corpora, 280, tmp_path).digest == bpe.digest


@pytest.mark.parametrize("model", ["bpe", "unigram", "wordpiece"])
def test_sentinels_are_the_last_ids_counted_down_and_no_text_encodes_to_them(model):
    plain = train_tokenizer(model, TEXTS, 300)
    more = add_sentinels(plain, 3)
    ids, size = vocabulary(more), plain.vocab_size
    assert [ids[f"<extra_id_{i}>"] for i in range(3)] == [size + 2, size + 1, size]
    assert more.vocab_size == size + 3
    text = "the cat <extra_id_0> sat"
    np.testing.assert_array_equal(more.encode(text), plain.encode(text))
    assert "<extra_id_1>" in more.decode([size + 1])


@pytest.mark.parametrize(
    ("model", "vocab_size", "message"),
    [
        ("bpe", 256, "at least 257"),
        ("unigram", 258, "at least 259"),
        ("wordpiece", 5, r"more than 5 \(the special tokens \[PAD\]"),
    ],
)
def test_a_vocabulary_without_room_for_what_it_needs_is_refused(model, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(model, TEXTS, vocab_size)
    with pytest.raises(ValueError, match="a words vocabulary of more than 2"):
        train_words(TEXTS, 2)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("model", "expected"),
    [("wordpiece", ["[CLS]", "the", "cat", "[SEP]"]), ("unigram", ["Ġthe", "Ġcat", "</s>"])],
)
def test_transformers_reads_the_file_and_adds_the_special_tokens(tmp_path, model, expected):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(model, TEXTS, 300)
    tokenizer.save(tmp_path)
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert loaded.convert_ids_to_tokens(loaded(" the cat")["input_ids"]) == expected
    assert json.loads(tokenizer.content)["post_processor"]["type"] == "TemplateProcessing"
