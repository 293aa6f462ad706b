"""Any text comes back exactly; the same text trains the same tokenizer."""

import io
import json
import sys

import numpy as np
import pytest

from lineage_jax.data import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from lineage_jax.data.tokenizers import END_OF_TEXT, HuggingFaceTokenizer

TEXTS = ["the cat sat on the mat, the cat sat\n" * 20, "def f(x):\n    return x + x\n" * 20]
STRANGE = "naïve 文字 🎈\x00\x7f\r\n \t\u2028 <|endoftext|>  \n\n  x"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


@pytest.mark.parametrize("text", ["", "plain", STRANGE, "".join(map(chr, range(0x800)))])
def test_any_text_comes_back_exactly(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert isinstance(tokenizer, Tokenizer)


def test_no_text_encodes_to_the_end_of_text_which_decodes_to_nothing(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        end = tokenizer.end_of_text
        ids = tokenizer.encode(STRANGE)
        assert end not in ids
        assert 0 <= end < tokenizer.vocab_size and ids.max() < tokenizer.vocab_size
        assert tokenizer.decode([*ids, end, *ids]) == STRANGE * 2


def test_bytes_are_their_own_ids():
    assert ByteTokenizer().encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert ByteTokenizer().decode([97, 0xC3]) == "a\ufffd"  # a model may sample half a letter


def test_a_batch_encodes_as_its_texts_do(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        for ids, text in zip(tokenizer.encode_batch(TEXTS), TEXTS, strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_bpe_shortens_the_text_that_it_was_trained_on(bpe):
    assert bpe.vocab_size <= 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 3


def test_training_twice_gives_the_same_tokenizer(bpe):
    assert train_bpe(iter(TEXTS), 300).digest == bpe.digest
    assert train_bpe(TEXTS, 280).digest != bpe.digest


def test_a_saved_tokenizer_is_the_one_that_is_loaded(bpe, tmp_path):
    for name, tokenizer in (("bytes", ByteTokenizer()), ("bpe", bpe)):
        tokenizer.save(tmp_path / name)
        for path in (tmp_path / name, tmp_path / name / "tokenizer.json"):
            loaded = load_tokenizer(path)
            assert loaded.digest == tokenizer.digest
            np.testing.assert_array_equal(loaded.encode(STRANGE), tokenizer.encode(STRANGE))


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(TEXTS, 256)


def test_what_is_no_tokenizer_is_refused_by_name(bpe, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    path = tmp_path / "t.json"
    for content in (b"", b"{", b"\xff", b"[]", b'{"model": 1}', b'{"model": {"type": "BPE"}}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.json: wanted a Hugging Face tokenizer\.json"):
            load_tokenizer(path)


def test_a_tokenizer_without_an_end_of_text_is_refused(bpe, tmp_path):
    content = json.loads(bpe.content.replace(END_OF_TEXT, "<|other|>"))
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"t\.json: wanted a token that ends a text"):
        load_tokenizer(path)


def test_truncation_and_padding_in_a_tokenizer_file_are_not_applied(bpe):
    content = json.loads(bpe.content)
    content["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    np.testing.assert_array_equal(
        HuggingFaceTokenizer(json.dumps(content)).encode(TEXTS[0]), bpe.encode(TEXTS[0])
    )


@pytest.fixture(scope="module")
def model():
    """A SentencePiece model with T5's ids, and bytes for letters that it has not seen."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].splitlines()), model_writer=file, vocab_size=300,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return file.getvalue()


def test_a_sentencepiece_model_reads_and_writes_text_as_that_package_does(model, tmp_path):
    import sentencepiece

    (tmp_path / "spiece.model").write_bytes(model)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    for path in (tmp_path, tmp_path / "spiece.model"):
        loaded = load_tokenizer(path)
        assert isinstance(loaded, SentencePieceTokenizer) and isinstance(loaded, Tokenizer)
        assert (loaded.vocab_size, loaded.end_of_text) == (oracle.vocab_size(), 1)
        for text in ("the cat sat", "naïve 文字 </s> cat", ""):
            ids = loaded.encode(text)
            assert ids.dtype == np.int32 and ids.tolist() == oracle.encode(text)
            assert 1 not in ids
            assert loaded.decode([*ids, 1]) == loaded.decode(ids) == text
        for ids, text in zip(loaded.encode_batch(TEXTS), TEXTS, strict=True):
            np.testing.assert_array_equal(ids, loaded.encode(text))


def test_a_saved_sentencepiece_model_is_the_one_that_is_loaded(model, tmp_path):
    SentencePieceTokenizer(model).save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == model
    assert load_tokenizer(tmp_path).digest == SentencePieceTokenizer(model).digest


def test_what_is_no_sentencepiece_model_is_refused_by_name(tmp_path):
    pytest.importorskip("sentencepiece")
    for content in (b"{}", b"", b"\xff" * 99):
        (tmp_path / "t.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.model: wanted a SentencePiece model"):
            load_tokenizer(tmp_path / "t.model")


def test_a_sentencepiece_model_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "t.model").write_bytes(b"any")
    with pytest.raises(ValueError, match=r"t\.model: .*pip install 'lineage-jax\[sentencepiece\]'"):
        load_tokenizer(tmp_path / "t.model")
