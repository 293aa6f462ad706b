"""Token files: what another program tokenized, read and written.

ArrayRecord: one record is one document, its ids as little-endian int32, four bytes each.
Parquet: one row is one document, a list of integers under `tokens` or `input_ids`; a file written
here says the digest of its tokens, since parquet would not notice every bit that is flipped.
Ids are taken as they are: a document should close with its end-of-text id.
"""

import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from lineage_jax.data.cache import write_whole
from lineage_jax.data.tokens import RECORD, TokenStream, join

TOKEN_COLUMNS = ("tokens", "input_ids")
DIGEST = (
    b"lineage_jax.sha256"  # in a parquet file's metadata: `TokenStream.digest` of what it holds
)


def is_token_file(name: str) -> bool:
    """Whether a file's name says that it holds tokens, a shard of a set of them included."""
    return not name.startswith(".") and (".array_record" in name or ".parquet" in name)


def write_tokens(stream: TokenStream, path: str | os.PathLike) -> None:
    """Writes one `.array_record` or `.parquet` file, whole or not at all."""
    from etils import epath

    place = epath.Path(path)
    if not is_token_file(place.name):
        raise ValueError(f"{place}: wanted a name that ends in .array_record or .parquet")
    if ".parquet" in place.name:
        import pyarrow as pa
        import pyarrow.parquet as pq

        offsets = np.append(stream.starts, len(stream.ids)).astype(np.int64)
        rows = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(stream.ids))
        table, file = pa.table({TOKEN_COLUMNS[0]: rows}), io.BytesIO()
        table = table.replace_schema_metadata({DIGEST: stream.digest})
        pq.write_table(table, file, write_page_checksum=True)
        write_whole(place, file.getvalue())
        return
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = _on_disk(place.with_name(f".{place.name}.tmp"))
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = ArrayRecordWriter(str(partial))
        for document in stream.documents:
            writer.write(document.astype(RECORD).tobytes())
        writer.close()
        partial.replace(place)
    except RuntimeError as error:
        raise OSError(f"{place}: cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def read_tokens(path: str | os.PathLike, vocab_size: int) -> TokenStream:
    """Reads one token file, or all of a folder's in the order of their names.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: a file is damaged, empty or of another format, or an id lies outside
        [0, vocab_size); naming the file, and the document (from 0) and the id.
    """
    from etils import epath

    root = epath.Path(path).expanduser()
    if root.is_dir():
        files = sorted(file for file in root.iterdir() if is_token_file(file.name))
    elif root.exists():
        files = [root]
    else:
        raise FileNotFoundError(f"{root}: no such file or folder; check the path (--data.path)")
    pieces = []
    for file in files:
        read = _read_parquet if ".parquet" in file.name else _read_array_record
        documents = read(file)
        if not any(map(len, documents)):
            raise ValueError(f"{file}: wanted documents of tokens, but it holds none")
        _refuse_foreign_ids(file, documents, vocab_size)
        pieces += [document for document in documents if len(document)]
    if not pieces:
        raise ValueError(f"{root}: wanted .array_record or .parquet files, found none")
    return join(pieces, vocab_size, None)


def _refuse_foreign_ids(file, documents: Sequence[np.ndarray], vocab_size: int) -> None:
    for number, ids in enumerate(documents):
        foreign = ids[(ids < 0) | (ids >= vocab_size)]
        if len(foreign):
            raise ValueError(
                f"{file}: document {number}: wanted ids in [0, {vocab_size}), came {foreign[0]}; "
                "check the vocabulary (--data.vocab-size) and the file's format"
            )


def _on_disk(file) -> pathlib.Path:
    if "://" in str(file):
        raise ValueError(
            f"{file}: ArrayRecord is read from a disk: copy it there, mount the "
            "bucket, or use parquet"
        )
    return pathlib.Path(file)


def _read_array_record(file) -> list[np.ndarray]:
    from array_record.python.array_record_module import ArrayRecordReader

    path = _on_disk(file)
    if not path.stat().st_size:
        raise ValueError(f"{file}: wanted an ArrayRecord file, but it is empty")
    try:
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()  # a truncated file may read as no records: closing it is what tells
    except RuntimeError:
        raise ValueError(
            f"{file}: wanted an ArrayRecord file, but it is truncated or damaged"
        ) from None
    for number, record in enumerate(records):
        if len(record) % RECORD.itemsize:
            raise ValueError(
                f"{file}: document {number}: wanted little-endian int32 ids, came "
                f"{len(record)} bytes"
            )
    return [np.frombuffer(record, RECORD) for record in records]


def _read_parquet(file) -> list[np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = file.read_bytes()
    if not data:
        raise ValueError(f"{file}: wanted a parquet file, but it is empty")
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        names = parquet.schema_arrow.names
        column = next((name for name in TOKEN_COLUMNS if name in names), None)
        rows = parquet.read([column])[column] if column else None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: wanted a parquet file, but it is truncated or damaged: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if rows is None:
        raise ValueError(f"{file}: wanted a column `tokens` or `input_ids`, it has {names}")
    listed = pa.types.is_list(rows.type) or pa.types.is_large_list(rows.type)
    if not (listed and pa.types.is_integer(rows.type.value_type)):
        raise ValueError(f"{file}: wanted lists of integers in {column!r}, came {rows.type}")
    documents = []
    for chunk in rows.chunks:
        values = chunk.flatten()
        if chunk.null_count or values.null_count:
            raise ValueError(f"{file}: wanted lists of integers in {column!r}, came a null")
        lengths = chunk.value_lengths().to_numpy()
        documents += np.split(values.to_numpy(), np.cumsum(lengths))[:-1]
    # Checksums of pages, which other programs may write too, do not cover their headers.
    digest = (parquet.schema_arrow.metadata or {}).get(DIGEST)
    if digest is not None and join(documents, 2**31, None).digest.encode() != digest:
        raise ValueError(f"{file}: wanted the tokens that were written, but it is damaged")
    return documents
