"""The runs table: one schema for sweep results, ours and anybody's.

A row is one training run (or one decayed branch of it) at its end; curves are a second table. Other
people's tables come with other names, integer columns, shuffled and duplicate rows, NaN, diverged
runs and FLOP counts that overflowed: `read_runs` takes them all, drops what cannot be used, and
keeps the reasons with their counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from scaling.columns import column_values, evaluate, numbers, truth, with_column
from scaling.exports import is_curves, last_values
from scaling.files import load, write_table

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
TEXT = ("run_id", "model", "flops_convention", "schedule")
POSITIVE = ("params", "tokens", "loss", "unique_tokens")
CURVES = ("run_id", "step", "tokens", "flops", "loss")


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
        return column_values(self.table, column)

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
            table = with_column(table, name, pa.array(values))
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
    table, warnings = load(source), []
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
        keep(~truth(column_values(table, "diverged")), "diverged")
    for role in needs:
        if _number_like(table, role):
            keep(np.isfinite(column_values(table, role)), f"{names[role]} is not a finite number")
        if role in POSITIVE:
            keep(column_values(table, role) > 0, f"{names[role]} is not positive")
    if given:
        keep(np.isfinite(column_values(table, "flops")), f"{given} is not a finite number")
    if not table.num_rows:
        reasons = "; ".join(f"{n} rows: {reason}" for reason, n in dropped)
        raise ValueError(f"no usable rows are left: {reasons}")
    sized = "params" in names and "tokens" in names
    if given and sized and (bad := int((column_values(table, "flops") <= 0).sum())):
        warnings.append(
            f"{bad} values of {given} are not positive, as when int64 overflows at 9.2e18: "
            "FLOPs were made as 6ND for all runs"
        )
        given = None
    if given is None and sized:
        made = 6.0 * column_values(table, "params") * column_values(table, "tokens")
        table, flops_convention = with_column(table, "flops", pa.array(made)), "6ND"
    elif flops_convention is None:
        flops_convention = _convention(table) if given and sized else "unstated"
    table = with_column(table, "flops_convention", pa.array([flops_convention] * table.num_rows))

    # The last key sorts first: equal runs lie together, and the best of them before the others.
    if duplicates == "best" and sized:
        same = [n for n in ("unique_tokens", "tokens", "params") if n in table.column_names]
        table = _sorted(table, ("loss", *same))
        keys = np.stack([column_values(table, name) for name in same])
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
    order = np.lexsort([column_values(table, name) for name in keys if name in table.column_names])
    return table.take(pa.array(order))


def _number_like(table: pa.Table, name: str) -> bool:
    return column_values(table, name).dtype != object


def write_runs(runs: Runs | pa.Table | Mapping[str, Any], path: Any) -> None:
    """Writes a runs table to .parquet or .csv, by its suffix.

    In CSV floats stand as their shortest exact form, so they read back bit for bit and the same
    table always gives the same bytes. The file appears whole or not at all.
    """
    table = runs.table if isinstance(runs, Runs) else load(runs)
    write_table(table, path)


def write_curves(curves: pa.Table | Mapping[str, Any], path: Any) -> None:
    """Writes loss curves (run_id, step, tokens, flops, loss) to .parquet or .csv."""
    table = load(curves)
    if missing := [name for name in CURVES if name not in table.column_names]:
        raise ValueError(f"curves need {', '.join(CURVES)}: missing {', '.join(missing)}")
    write_table(table, path)


def read_curves(source: Any) -> pa.Table:
    """Reads loss curves: a table with run_id, step, tokens, flops, loss."""
    table = load(source)
    if missing := [name for name in CURVES if name not in table.column_names]:
        raise ValueError(f"curves need {', '.join(CURVES)}: missing {', '.join(missing)}")
    return table


def _plain(name: str) -> str:
    """A column's name in small letters and digits alone."""
    return "".join(c for c in name.lower() if c.isalnum())


def _canonical(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """The schema's columns under the schema's names in float64; a displaced one is kept aside."""
    made = {
        role: table.column(name) if role in TEXT else pa.array(numbers(table, name))
        for role, name in columns.items()
    }
    for role, name in columns.items():
        if role != name and role in table.column_names:
            table = with_column(table, f"{role}_original", table.column(role))
    for role, values in made.items():
        table = with_column(table, role, values)
    first = [name for name in SCHEMA if name in table.column_names]
    return table.select(first + [name for name in table.column_names if name not in first])


def _convention(table: pa.Table) -> str:
    if "flops_convention" in table.column_names:
        names = sorted({str(v) for v in column_values(table, "flops_convention")})
        return names[0] if len(names) == 1 else "mixed: " + ", ".join(names)
    c, n, d = (column_values(table, name) for name in ("flops", "params", "tokens"))
    return "6ND" if np.allclose(c / (6 * n * d), 1, rtol=1e-6) else "unstated"
