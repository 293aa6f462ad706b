"""A stream is its documents, closed and joined; a split of it loses and repeats nothing."""

import numpy as np
import pytest

from lineage_jax.data import (
    ByteTokenizer,
    Corpus,
    Document,
    TokenStream,
    split_tokens,
    tokenize,
    tokenize_cached,
    train_bpe,
)
from lineage_jax.data.tokens import join

DOCUMENTS = (Document("a", "héllo"), Document("b", "wor\nld"))


def test_each_document_closes_with_the_end_of_text():
    stream = tokenize(DOCUMENTS, ByteTokenizer())
    assert stream.ids.tolist() == [*"héllo".encode(), 256, *b"wor\nld", 256]
    assert stream.starts.tolist() == [0, 7]
    assert (stream.num_bytes, stream.num_tokens, stream.num_targets) == (12, 14, 12)


def test_documents_beyond_one_batch_of_encoding_keep_their_order():
    documents = [Document(str(i), f"text {i}") for i in range(300)]
    stream = tokenize(documents, ByteTokenizer())
    texts = [ByteTokenizer().decode(ids) for ids in stream.documents]
    assert texts == [document.text for document in documents]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_ids_are_held_in_two_bytes_where_the_vocabulary_allows(vocab_size, dtype):
    stream = join([np.array([vocab_size - 1])], vocab_size, None)
    assert stream.ids.dtype == dtype
    assert stream.ids[0] == vocab_size - 1


def test_the_digest_depends_on_ids_and_borders_but_not_on_how_they_are_held():
    ids, starts = np.array([1, 2, 3], np.uint16), np.array([0, 2])
    digest = TokenStream(ids, starts).digest
    assert TokenStream(ids.astype(np.int32), starts.astype(np.int32)).digest == digest
    assert TokenStream(ids, np.array([0, 1])).digest != digest
    assert TokenStream(ids[::-1], starts).digest != digest


def test_cached_tokens_are_the_tokens_and_are_not_made_again(tmp_path, monkeypatch):
    corpus, tokenizer = Corpus("c", DOCUMENTS), train_bpe(["héllo wor ld"], 260)
    fresh = tokenize(DOCUMENTS, tokenizer)
    assert tokenize_cached(corpus, tokenizer, tmp_path).digest == fresh.digest
    with monkeypatch.context() as patch:
        patch.setattr("lineage_jax.data.tokens.tokenize", None)
        again = tokenize_cached(corpus, tokenizer, tmp_path)
    assert (again.digest, again.num_bytes) == (fresh.digest, fresh.num_bytes)
    assert again.ids.dtype == fresh.ids.dtype
    other = tokenize_cached(corpus, ByteTokenizer(), tmp_path)  # the same text, another tokenizer
    assert other.digest == tokenize(DOCUMENTS, ByteTokenizer()).digest


def test_a_corrupt_token_cache_is_rebuilt_not_trusted(tmp_path):
    corpus = Corpus("c", DOCUMENTS)
    fresh = tokenize_cached(corpus, ByteTokenizer(), tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole.replace(b"l", b"L"), b""):
        file.write_bytes(damaged)
        assert tokenize_cached(corpus, ByteTokenizer(), tmp_path).digest == fresh.digest
        assert file.read_bytes() == whole


def stream_of(*sizes):
    return join([np.arange(size) + 10 * i for i, size in enumerate(sizes)], 5000, None)


def test_a_split_gives_each_document_to_one_side_in_order():
    stream = stream_of(*range(2, 102))
    train, heldout = split_tokens(stream, 0.3)
    whole = [document.tolist() for document in stream.documents]
    sides = [[document.tolist() for document in side.documents] for side in (train, heldout)]
    assert sorted(sides[0] + sides[1]) == sorted(whole)
    for side in sides:
        assert side == [document for document in whole if document in side]
    assert 10 < len(sides[1]) < 50


def test_of_a_single_document_the_last_tokens_are_held_out():
    train, heldout = split_tokens(stream_of(100), 0.1)
    assert (train.ids.tolist(), heldout.ids.tolist()) == (list(range(90)), list(range(90, 100)))
    assert (train.starts.tolist(), heldout.starts.tolist()) == ([0], [0])


def test_few_documents_that_fall_on_one_side_are_cut_as_one_stream():
    stream = stream_of(4, 3, 3)  # their hashes, as fractions: 0.998, 0.217, 0.855
    train, heldout = split_tokens(stream, 0.2)
    assert [ids.tolist() for ids in train.documents] == [[0, 1, 2, 3], [10, 11, 12], [20]]
    assert [ids.tolist() for ids in heldout.documents] == [[21, 22]]


def test_a_tail_may_begin_where_a_document_does():
    stream = stream_of(9, 2, 3, 2)  # hashes 0.534, 0.723, 0.855, 0.888
    train, heldout = split_tokens(stream, 5 / 16)
    assert (train.starts.tolist(), heldout.starts.tolist()) == ([0, 9], [0, 3])
    assert heldout.ids.tolist() == [20, 21, 22, 30, 31]


def test_too_few_tokens_to_split_are_refused():
    with pytest.raises(ValueError, match="too short to hold out"):
        split_tokens(stream_of(2), 0.5)
