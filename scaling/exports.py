"""Tables out of what trackers keep: TensorBoard's event files, charts of Weights & Biases.

Both are curves: many rows to a run, a column for each thing logged, NaN where it was not. Of these
a fit of finished runs takes the last value of each; a fit of curves takes all.
"""

import pathlib
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa

EVENTS = "events.out.tfevents"
INSTALL = "install it with: python -m pip install 'lineage-jax[track]'"


def read_events(folder: str) -> pa.Table:
    """TensorBoard's event files below a folder: run_id (the subfolder), step, and each tag.

    Raises:
      FileNotFoundError: there are none.
      ImportError: without tensorboard.
    """
    root = pathlib.Path(folder)
    runs = sorted({path.parent for path in root.rglob(f"{EVENTS}*")})
    if not runs:
        raise FileNotFoundError(
            f"{folder} holds no {EVENTS} files: wanted TensorBoard's logs, or a .csv, .parquet or "
            ".jsonl of runs"
        )
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise ImportError(f"event files need tensorboard; {INSTALL}") from error
    rows: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for run in runs:
        name = str(run.relative_to(root)) if run != root else root.name
        events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                rows[name, event.step][tag] = event.value
        for tag in events.Tags()["tensors"]:
            for event in events.Tensors(tag):
                value = make_ndarray(event.tensor_proto)
                if value.size == 1 and value.dtype.kind in "fiu":
                    rows[name, event.step][tag] = float(value.item())
    return _table(rows)


def unfold_chart(table: pa.Table) -> pa.Table:
    """The CSV of a Weights & Biases line chart, `Step, RUN - NAME, ...`, as run_id, step, NAME.

    Any other table comes back as it is.
    """
    names = [n for n in table.column_names if " - " in n and not n.endswith(("__MIN", "__MAX"))]
    if not names or table.column_names[0] not in ("Step", "_step"):
        return table
    steps = table.column(0).to_pylist()
    rows: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for name in names:
        run, _, logged = name.rpartition(" - ")
        for step, value in zip(steps, table.column(name).to_pylist(), strict=True):
            if isinstance(value, int | float):
                rows[run, step][logged] = value
    return _table(rows)


def is_curves(table: pa.Table) -> bool:
    """Whether a table is of curves as this module makes them."""
    return table.schema.metadata is not None and b"curves" in table.schema.metadata


def last_values(table: pa.Table) -> pa.Table:
    """Of each run of such a table the last value of each column."""
    names = [name for name in table.column_names if name != "run_id"]
    run_ids = np.array(table.column("run_id").to_pylist())
    values = {name: np.asarray(table.column(name).to_pylist(), np.float64) for name in names}
    runs = list(dict.fromkeys(run_ids))
    columns: dict[str, Any] = {"run_id": [str(run) for run in runs]}
    for name, column in values.items():
        there = [column[(run_ids == run) & np.isfinite(column)] for run in runs]
        columns[name] = [float(found[-1]) if found.size else float("nan") for found in there]
    return pa.table(columns)


def _table(rows: dict[tuple[str, int], dict[str, float]]) -> pa.Table:
    order = sorted(rows)
    names = sorted({name for row in rows.values() for name in row} - {"run_id", "step"})
    columns = {
        "run_id": [run for run, _ in order],
        "step": [int(step) for _, step in order],
        **{name: [float(rows[key].get(name, np.nan)) for key in order] for name in names},
    }
    return pa.table(columns).replace_schema_metadata({"curves": "1"})
