"""The columns of a table: as numbers, as truth, and which rows satisfy an expression."""

import ast
import difflib
import operator
from typing import Any

import numpy as np
import pyarrow as pa

MULTIPLES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
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


def column_values(table: pa.Table, name: str) -> np.ndarray:
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


def numbers(table: pa.Table, name: str) -> np.ndarray:
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

    values = column_values(table, name)
    return values if values.dtype != object else np.array([number(v) for v in values], np.float64)


def truth(values: np.ndarray) -> np.ndarray:
    """True where a flag is set, whether it was written as a bool, a number or a word."""
    if values.dtype != object:
        return np.nan_to_num(values) != 0
    return np.array([str(v).strip().lower() in ("true", "1", "yes", "t") for v in values])


def with_column(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with a column of that name, replaced if it was there."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


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
                    return column_values(table, name)
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
