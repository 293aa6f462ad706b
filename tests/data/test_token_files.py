"""Token files come back as they were written; damaged and foreign ones are refused by name."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lineage_jax.data import read_tokens, write_tokens
from lineage_jax.data.tokens import join

STREAM = join([np.array([1, 2, 3]), np.array([4]), np.array([99, 0])], 100, None)
KINDS = pytest.mark.parametrize("kind", ["array_record", "parquet"])


@KINDS
@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_what_is_written_is_what_is_read(tmp_path, kind, vocab_size):
    path = tmp_path / f"t.{kind}"
    write_tokens(STREAM, path)
    read = read_tokens(path, vocab_size)
    assert read.digest == STREAM.digest
    assert read.num_bytes is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing half-written beside it


def test_a_record_is_little_endian_int32():
    assert np.array([1, 258], "<i4").tobytes() == b"\1\0\0\0\2\1\0\0"


def test_records_that_others_wrote_as_documented_are_read(tmp_path):
    path = str(tmp_path / "t.array_record")
    writer = ArrayRecordWriter(path)
    writer.write(b"\1\0\0\0\2\1\0\0")
    writer.write(b"")
    writer.write(b"\7\0\0\0")
    writer.close()
    assert [ids.tolist() for ids in read_tokens(path, 300).documents] == [[1, 258], [7]]


@pytest.mark.parametrize("column", ["tokens", "input_ids"])
@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.uint16()])
def test_parquet_lists_of_any_integer_type_are_read(tmp_path, column, kind):
    rows = pa.array([[1, 2], [], [3]], pa.list_(kind))
    pq.write_table(pa.table({"other": [1, 2, 3], column: rows}), tmp_path / "t.parquet")
    read = read_tokens(tmp_path / "t.parquet", 10)
    assert [ids.tolist() for ids in read.documents] == [[1, 2], [3]]


def test_a_folder_of_shards_is_read_in_the_order_of_names(tmp_path):
    for shard in (1, 0, 2):
        name = f"t.array_record-{shard:05d}-of-00003"
        write_tokens(join([np.array([shard, 9])], 10, None), tmp_path / name)
    (tmp_path / "README.md").write_text("not tokens")
    assert read_tokens(tmp_path, 10).ids.tolist() == [0, 9, 1, 9, 2, 9]


@KINDS
@pytest.mark.parametrize("foreign", [10, -1, 2**30])
def test_an_id_outside_the_vocabulary_is_refused_naming_file_document_and_id(
    tmp_path, kind, foreign
):
    stream = join([np.array([1, 9]), np.array([2, foreign, 3])], 2**31, None)
    write_tokens(stream, tmp_path / f"t.{kind}")
    with pytest.raises(ValueError, match=rf"t\.{kind}: document 1: .*\[0, 10\), came {foreign};"):
        read_tokens(tmp_path, 10)


@KINDS
def test_empty_truncated_and_foreign_files_are_refused_by_name(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    rng = np.random.default_rng(0)
    write_tokens(join([rng.integers(0, 50_000, 200_000)], 50_000, None), path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-9], whole[:100], b"text\n" * 30_000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"t\.{kind}: wanted") as error:
            read_tokens(path, 50_000)
        assert "\n" not in str(error.value)


def test_a_truncated_array_record_does_not_pass_for_an_empty_one(tmp_path):
    path = tmp_path / "t.array_record"
    write_tokens(STREAM, path)
    path.write_bytes(path.read_bytes()[:65_536])  # opens, and reads as no records
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_tokens(path, 100)


def test_a_flipped_bit_in_an_array_record_is_refused(tmp_path):
    path = tmp_path / "t.array_record"
    rng = np.random.default_rng(0)
    write_tokens(join([rng.integers(0, 50_000, 20_000)], 50_000, None), path)
    damaged = bytearray(path.read_bytes())
    damaged[30_000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_tokens(path, 50_000)


def test_files_without_documents_or_of_another_layout_are_refused(tmp_path):
    empty = ArrayRecordWriter(str(tmp_path / "e.array_record"))
    empty.close()
    odd = ArrayRecordWriter(str(tmp_path / "o.array_record"))
    odd.write(b"\1\2\3")
    odd.close()
    tables = {
        "none": {"tokens": pa.array([], pa.list_(pa.int32()))},
        "text": {"text": ["a"]},
        "flat": {"tokens": [1, 2]},
        "null": {"tokens": pa.array([[1, None]], pa.list_(pa.int32()))},
        "hole": {"tokens": pa.array([[1], None], pa.list_(pa.int32()))},
    }
    for name, table in tables.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    for name, message in (
        ("e.array_record", "holds none"),
        ("o.array_record", "document 0: wanted little-endian int32 ids, came 3 bytes"),
        ("none.parquet", "holds none"),
        ("text.parquet", r"a column `tokens` or `input_ids`, it has \['text'\]"),
        ("flat.parquet", "wanted lists of integers"),
        ("null.parquet", "came a null"),
        ("hole.parquet", "came a null"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read_tokens(tmp_path / name, 10)
        assert name in str(error.value)


def test_missing_paths_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        read_tokens(tmp_path / "nowhere", 10)
    with pytest.raises(ValueError, match="found none"):
        read_tokens(tmp_path, 10)
    with pytest.raises(ValueError, match=r"wanted a name that ends in \.array_record"):
        write_tokens(STREAM, tmp_path / "t.bin")
    with pytest.raises(ValueError, match="read from a disk"):
        write_tokens(STREAM, "gs://bucket/t.array_record")
