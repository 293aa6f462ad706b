"""Tables from files and to files, whole or not at all."""

import csv
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from scaling.exports import read_events, unfold_chart


def write_table(table: pa.Table, path: Any) -> None:
    """Writes any table to .parquet or .csv, atomically; CSV floats by repr."""
    import pyarrow.parquet as pq
    from etils import epath

    path = epath.Path(path)
    partial = path.parent / f".{path.name}.partial"
    if path.suffix == ".parquet":
        with partial.open("wb") as file:
            pq.write_table(table, file)
    elif path.suffix == ".csv":
        with partial.open("w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table.column_names)
            for row in zip(*(c.to_pylist() for c in table.columns), strict=True):
                # csv writes floats by repr and None as an empty field.
                writer.writerow(row)
    else:
        raise ValueError(f"cannot write {path.name}: wanted a name that ends in .csv or .parquet")
    partial.replace(path)


def load(source: Any) -> pa.Table:
    """Any source to a pyarrow table."""
    if isinstance(source, pa.Table):
        return source
    if isinstance(source, Mapping):
        return pa.table({name: _array(values) for name, values in source.items()})
    if isinstance(source, str | os.PathLike):
        return _load_file(os.fspath(source))
    if hasattr(source, "__dataframe__") or hasattr(source, "iloc"):
        return pa.Table.from_pandas(source, preserve_index=False)
    raise ValueError(
        "runs: wanted a path to .csv, .parquet or .jsonl, a pyarrow Table, a DataFrame or a "
        f"mapping of columns, got {type(source).__name__}"
    )


def _array(values: Any) -> pa.Array:
    """A column from a list or an array; mixed numbers become floats rather than an error."""
    if isinstance(values, np.ndarray):
        return pa.array(values)
    try:
        return pa.array(list(values))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if v is None else float(v) for v in values], pa.float64())


def _load_file(path: str) -> pa.Table:
    import pyarrow.csv
    import pyarrow.parquet
    from etils import epath

    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no file {path}: wanted a .csv, .parquet or .jsonl of runs")
    if file.is_dir():
        return read_events(path)
    kind = file.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet", ".jsonl"):
        raise ValueError(
            f"{path}: wanted a .csv, .parquet or .jsonl of runs, got {kind or 'no suffix'}"
        )
    data = file.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty: wanted a table of runs with params, tokens and loss")
    try:
        if kind == ".parquet":
            return pyarrow.parquet.read_table(pa.BufferReader(data))
        if kind == ".jsonl":
            return _load_jsonl(data.decode(), path)
        delimiter = "\t" if kind == ".tsv" else ","
        options = pyarrow.csv.ParseOptions(delimiter=delimiter)
        return unfold_chart(pyarrow.csv.read_csv(pa.BufferReader(data), parse_options=options))
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path} is not readable as {kind[1:]}: {str(error).splitlines()[0]}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None


def _load_jsonl(text: str, path: str) -> pa.Table:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: wanted an object, got {type(row).__name__}")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _array([row.get(name) for row in rows]) for name in names})
