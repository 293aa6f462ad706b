"""The runs table: one schema for sweep results, ours and anybody's.

A row is one training run (or one decayed branch of it) at its end; curves are a second table. Other
people's tables come with other names, integer columns, shuffled and duplicate rows, NaN, diverged
runs and FLOP counts that overflowed: `read_runs` takes them all, drops what cannot be used, and
keeps the reasons with their counts.
"""

import ast
import csv
import difflib
import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from scaling.exports import is_curves, last_values, read_events, unfold_chart

# Column -> what it holds. Only params, tokens and loss must be there; others are kept as they come.
SCHEMA = {
    "run_id": "name of the run",
    "model": "name of the model size",
    "params": "parameters, embeddings included",
    "params_no_embed": "parameters without embeddings",
    "params_active": "parameters that one token uses (mixtures of experts)",
    "tokens": "training tokens seen",
    "flops": "training FLOPs",
    "flops_convention": "how FLOPs were counted, such as 6ND",
    "loss": "held-out loss, nats per token",
    "bits_per_byte": "held-out loss in bits per byte of text",
    "unique_tokens": "tokens of training text that differ; fewer than `tokens` if text is repeated",
    "accuracy": "of a downstream task, a part of one",
    "learning_rate": "peak learning rate",
    "batch_tokens": "tokens per step",
    "seed": "random seed",
    "schedule": "learning-rate schedule",
    "decayed": "whether the learning rate had been decayed",
    "diverged": "whether the run diverged",
}
# What others call the columns that a fit reads, in small letters and digits alone.
ALIASES = {
    "params": ("n", "nparams", "numparams", "parameters", "numparameters", "totalparams"),
    "tokens": ("d", "ntokens", "numtokens", "traintokens", "trainingtokens", "tokensseen"),
    "loss": ("finalloss", "valloss", "validationloss", "evalloss", "heldoutloss", "testloss"),
    "flops": ("c", "compute", "trainflops", "trainingflops", "totalflops"),
}
MULTIPLES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
TEXT = ("run_id", "model", "flops_convention", "schedule")
POSITIVE = ("params", "tokens", "loss", "unique_tokens")
CURVES = ("run_id", "step", "tokens", "flops", "loss")

_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs that can be fitted, by rising FLOPs, whatever the order they came in.

    Attributes:
      table: canonical columns (float64 params, tokens, flops, loss) and all others as they came.
      flops_convention: how the FLOPs were counted.
      dropped: (reason, number of rows), for rows that were not usable.
      warnings: what a reader of any result should know of the table, in plain words.
    """

    table: pa.Table
    flops_convention: str
    dropped: tuple[tuple[str, int], ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return self.table.num_rows

    def __contains__(self, column: str) -> bool:
        return column in self.table.column_names

    def __getitem__(self, column: str) -> np.ndarray:
        """The values of one column, (R,): float64 if they are numbers, else objects."""
        return _values(self.table, column)

    def mask(self, expression: str) -> np.ndarray:
        """Which rows satisfy an expression such as 'flops>1e21 and params<1e9', (R,) bool."""
        return evaluate(self.table, expression)

    def take(self, rows: np.ndarray) -> "Runs":
        """The same table with only these rows (a mask or indices)."""
        rows = np.asarray(rows)
        indices = np.flatnonzero(rows) if rows.dtype == bool else rows
        return replace(self, table=self.table.take(pa.array(indices, pa.int64())))

    def with_columns(self, **columns: np.ndarray) -> "Runs":
        """The same runs with other values in these columns, (R,) each."""
        table = self.table
        for name, values in columns.items():
            table = _set(table, name, pa.array(values))
        return replace(self, table=table)


def read_runs(
    source: Any,
    *,
    params: str = "params",
    tokens: str = "tokens",
    loss: str = "loss",
    flops: str | None = "flops",
    flops_convention: str | None = None,
    where: str | None = None,
    duplicates: str = "best",
    needs: Sequence[str] = ("params", "tokens", "loss"),
    **columns: str,
) -> Runs:
    """Reads anybody's results into the schema.

    Args:
      source: path of a .csv, .parquet or .jsonl file, of a chart's CSV from Weights & Biases or of
        a folder with TensorBoard's event files; or a pyarrow Table, a DataFrame, or a mapping from
        column names to values.
      params: the column that holds N; `params_no_embed` is taken if it is absent.
      tokens: the column that holds D.
      loss: the column that holds the loss, nats per token.
      flops: the column that holds training FLOPs. None, or an absent column: 6 N D.
      flops_convention: how `flops` was counted; by default what the table says.
      where: keep only the rows of which this is true, such as 'outlier_excluded==0'.
      duplicates: "best" keeps the least loss of runs that share N and D (the best over learning
        rates); "keep" keeps all.
      needs: the columns without which a row is of no use; those of the law that is to be fitted.
      **columns: what other columns of the schema are called, such as unique_tokens="U".

    Raises:
      ValueError: a column is missing, an expression is wrong, or no row is usable.
      OSError: the file cannot be read.
    """
    if duplicates not in ("best", "keep"):
        raise ValueError(f"duplicates: wanted 'best' or 'keep', got {duplicates!r}")
    table, warnings = _load(source), []
    if is_curves(table) and "step" not in needs:
        table = last_values(table)
    there = table.column_names
    if params == "params" and params not in there and "params_no_embed" in there:
        params = "params_no_embed"
        if "params" in needs:
            warnings.append("no column 'params': N is params_no_embed, without embeddings")
    names = {"params": params, "tokens": tokens, "loss": loss} | columns
    names |= {"flops": flops} if flops else {}
    names, needs = _find_columns(there, names, needs, warnings)
    given = names.get("flops")
    table, dropped = _canonical(table, names), []

    def keep(good: np.ndarray, reason: str) -> None:
        nonlocal table
        if not good.all():
            dropped.append((reason, int((~good).sum())))
            table = table.filter(pa.array(good))

    if not table.num_rows:
        raise ValueError("no rows: the table has a header and nothing below it")
    if where:
        keep(evaluate(table, where), f"not {where}")
    if "diverged" in there:
        keep(~_truth(_values(table, "diverged")), "diverged")
    for role in needs:
        if _number_like(table, role):
            keep(np.isfinite(_values(table, role)), f"{names[role]} is not a finite number")
        if role in POSITIVE:
            keep(_values(table, role) > 0, f"{names[role]} is not positive")
    if given:
        keep(np.isfinite(_values(table, "flops")), f"{given} is not a finite number")
    if not table.num_rows:
        reasons = "; ".join(f"{n} rows: {reason}" for reason, n in dropped)
        raise ValueError(f"no usable rows are left: {reasons}")
    sized = "params" in names and "tokens" in names
    if given and sized and (bad := int((_values(table, "flops") <= 0).sum())):
        warnings.append(
            f"{bad} values of {given} are not positive, as when int64 overflows at 9.2e18: "
            "FLOPs were made as 6ND for all runs"
        )
        given = None
    if given is None and sized:
        made = 6.0 * _values(table, "params") * _values(table, "tokens")
        table, flops_convention = _set(table, "flops", pa.array(made)), "6ND"
    elif flops_convention is None:
        flops_convention = _convention(table) if given and sized else "unstated"
    table = _set(table, "flops_convention", pa.array([flops_convention] * table.num_rows))

    # The last key sorts first: equal runs lie together, and the best of them before the others.
    if duplicates == "best" and sized:
        same = [n for n in ("unique_tokens", "tokens", "params") if n in table.column_names]
        table = _sorted(table, ("loss", *same))
        keys = np.stack([_values(table, name) for name in same])
        first = np.concatenate([[True], (keys[:, 1:] != keys[:, :-1]).any(0)])
        keep(first, f"same {' and '.join(reversed(same))} as a run of lower loss")
    table = _sorted(table, ("loss", "tokens", "params", "flops"))
    return Runs(
        table=table,
        flops_convention=flops_convention,
        dropped=tuple(dropped),
        warnings=tuple(warnings),
    )


def _find_columns(
    there: Sequence[str], names: Mapping[str, str], needs: Sequence[str], warnings: list[str]
) -> tuple[dict[str, str], Sequence[str]]:
    """Which column of a table plays which role, {role: column}; and the roles that must be there.

    A role whose column has the role's own name is also found under what others call it. FLOPs that
    are needed and not there are made of params and tokens.

    Raises:
      ValueError: a role that is needed, or a column that was named, is not there.
    """
    names = {role: role for role in needs if role != "flops"} | dict(names)
    for role in [role for role, name in names.items() if name == role and role not in there]:
        found = [name for name in there if _plain(name) in ALIASES.get(role, ())]
        if len(found) == 1:
            names[role] = found[0]
            warnings.append(f"no column {role!r}: it is read from {found[0]!r}")
    if "flops" in needs and ("flops" not in names or names["flops"] == "flops" not in there):
        needs = [*(role for role in needs if role != "flops"), "params", "tokens"]
    for role, name in names.items():
        if name not in there and (role in needs or name != role):
            raise ValueError(
                f"no column {name!r} for {role}: the table has {', '.join(there)}; "
                f"name yours with {role}=..."
            )
    return {role: name for role, name in names.items() if name in there}, needs


def _sorted(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """By those of the keys that are there; the last sorts first."""
    order = np.lexsort([_values(table, name) for name in keys if name in table.column_names])
    return table.take(pa.array(order))


def _number_like(table: pa.Table, name: str) -> bool:
    return _values(table, name).dtype != object


def evaluate(table: pa.Table, expression: str) -> np.ndarray:
    """Which rows of a table satisfy an expression, (R,) bool.

    Comparisons, arithmetic, and/or/not, numbers, strings and column names; nothing else runs.

    Raises:
      ValueError: the expression is malformed or names a column that is not there.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read the expression {expression!r}: {error}") from None

    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() | bool()):
                return node.value
            case ast.Name(id=name):
                if name in table.column_names:
                    return _values(table, name)
                if name.lower() in ("true", "false"):
                    return name.lower() == "true"
                close = difflib.get_close_matches(name, table.column_names, 1, 0.5)
                hint = f"did you mean {close[0]!r}?" if close else "there are "
                hint = hint if close else hint + ", ".join(table.column_names)
                raise ValueError(f"no column {name!r} in {expression!r}: {hint}")
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return ~np.asarray(walk(inner), bool)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -walk(inner)
            case ast.BoolOp(op=op, values=parts):
                join = np.logical_and if isinstance(op, ast.And) else np.logical_or
                return join.reduce(
                    [np.broadcast_to(np.asarray(walk(p), bool), table.num_rows) for p in parts]
                )
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](walk(left), walk(right))
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(
                type(op) in _COMPARE for op in ops
            ):
                sides = [walk(left), *map(walk, rest)]
                tests = [
                    _COMPARE[type(op)](a, b)
                    for op, a, b in zip(ops, sides, sides[1:], strict=False)
                ]
                return np.logical_and.reduce(tests)
        raise ValueError(
            f"{ast.unparse(node)!r} in {expression!r} is not allowed: use comparisons, arithmetic, "
            "and/or/not, numbers, strings and column names"
        )

    try:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.broadcast_to(np.asarray(walk(tree), bool), table.num_rows).copy()
    except TypeError:
        raise ValueError(f"{expression!r} compares a number with text") from None


def write_runs(runs: Runs | pa.Table | Mapping[str, Any], path: Any) -> None:
    """Writes a runs table to .parquet or .csv, by its suffix.

    In CSV floats stand as their shortest exact form, so they read back bit for bit and the same
    table always gives the same bytes. The file appears whole or not at all.
    """
    table = runs.table if isinstance(runs, Runs) else _load(runs)
    write_table(table, path)


def write_curves(curves: pa.Table | Mapping[str, Any], path: Any) -> None:
    """Writes loss curves (run_id, step, tokens, flops, loss) to .parquet or .csv."""
    table = _load(curves)
    if missing := [name for name in CURVES if name not in table.column_names]:
        raise ValueError(f"curves need {', '.join(CURVES)}: missing {', '.join(missing)}")
    write_table(table, path)


def read_curves(source: Any) -> pa.Table:
    """Reads loss curves: a table with run_id, step, tokens, flops, loss."""
    table = _load(source)
    if missing := [name for name in CURVES if name not in table.column_names]:
        raise ValueError(f"curves need {', '.join(CURVES)}: missing {', '.join(missing)}")
    return table


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


def _load(source: Any) -> pa.Table:
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


def _values(table: pa.Table, name: str) -> np.ndarray:
    """One column: float64 (null as NaN) when it holds numbers or truth, else objects."""
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), np.float64)
    return np.asarray(column.to_pylist(), object)


def _plain(name: str) -> str:
    """A column's name in small letters and digits alone."""
    return "".join(c for c in name.lower() if c.isalnum())


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """One column as float64: 70M and 1.4T are numbers too; other text becomes NaN."""

    def number(value: Any) -> float:
        text = str(value).strip().replace(",", "")
        try:
            return float(text[:-1]) * MULTIPLES[text[-1:].upper()]
        except (ValueError, KeyError):
            pass
        try:
            return float(text)
        except ValueError:
            return float("nan")

    values = _values(table, name)
    return values if values.dtype != object else np.array([number(v) for v in values], np.float64)


def _truth(values: np.ndarray) -> np.ndarray:
    """True where a flag is set, whether it was written as a bool, a number or a word."""
    if values.dtype != object:
        return np.nan_to_num(values) != 0
    return np.array([str(v).strip().lower() in ("true", "1", "yes", "t") for v in values])


def _set(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


def _canonical(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """The schema's columns under the schema's names in float64; a displaced one is kept aside."""
    made = {
        role: table.column(name) if role in TEXT else pa.array(_numbers(table, name))
        for role, name in columns.items()
    }
    for role, name in columns.items():
        if role != name and role in table.column_names:
            table = _set(table, f"{role}_original", table.column(role))
    for role, values in made.items():
        table = _set(table, role, values)
    first = [name for name in SCHEMA if name in table.column_names]
    return table.select(first + [name for name in table.column_names if name not in first])


def _convention(table: pa.Table) -> str:
    if "flops_convention" in table.column_names:
        names = sorted({str(v) for v in _values(table, "flops_convention")})
        return names[0] if len(names) == 1 else "mixed: " + ", ".join(names)
    ratio = _values(table, "flops") / (6 * _values(table, "params") * _values(table, "tokens"))
    return "6ND" if np.allclose(ratio, 1, rtol=1e-6) else "unstated"
