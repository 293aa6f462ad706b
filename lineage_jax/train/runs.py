"""Runs, as their folders tell of them: the STATUS.json that a run writes, and a reader of many.

Knows no jax, so that `lineage runs` answers at once.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import socket
from typing import Any

from etils import epath

FILE = "STATUS.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """How a run stands, and the process that says so.

    Attributes:
      status: "running", "finished", "preempted" (saved, to be run again) or "failed". Of a run
        that is read: "killed" too, where it says "running" and its process is gone.
      step: steps taken.
      num_steps: steps wanted.
      loss: of the last step whose metrics are known, in the objective's unit; None before.
      why: what stopped it, if something did.
      time: when this was written, ISO 8601, UTC.
      host: the machine.
      pid: the process there.
      born: when that process began, in clock ticks since the machine started, which tells it from
        a later one of the same number; None where the system does not say (all but Linux).
    """

    status: str
    step: int
    num_steps: int
    loss: float | None
    why: str
    time: str
    host: str
    pid: int
    born: int | None


def status_now(
    status: str, step: int, num_steps: int, *, loss: float | None = None, why: str = ""
) -> Status:
    """The status of this process's run, to be written down."""
    me = _stat(os.getpid())
    return Status(
        status=status,
        step=step,
        num_steps=num_steps,
        loss=loss,
        why=why,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        pid=os.getpid(),
        born=me and me[1],
    )


def read_status(run: epath.PathLike) -> Status:
    """How the run in that folder stands. A process that is gone is noticed on its own host only.

    Raises:
      ValueError: if its STATUS.json is not one.
    """
    path = epath.Path(run) / FILE
    try:
        status = Status(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: wanted the status of a run, came: {error}") from None
    here = status.host == socket.gethostname()
    if status.status == "running" and here and not alive(status.pid, status.born):
        why = f"process {status.pid} is gone; run the same command with --resume"
        return dataclasses.replace(status, status="killed", why=why)
    return status


def read_runs(folder: epath.PathLike) -> list[dict[str, Any]]:
    """The runs in a folder (or the one that it is), the latest first: their folder and status.

    A status that cannot be read stands as "unknown", and why.

    Raises:
      FileNotFoundError: nothing is at `folder`.
    """
    root = epath.Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; wanted one that holds runs")
    rows = []
    for run in (root, *sorted(root.iterdir())):
        if (run / FILE).exists():
            try:
                rows.append({"run": str(run), **dataclasses.asdict(read_status(run))})
            except ValueError as error:
                nothing = dict.fromkeys(field.name for field in dataclasses.fields(Status))
                rows.append({"run": str(run), **nothing, "status": "unknown", "why": str(error)})
    return sorted(rows, key=lambda row: row["time"] or "", reverse=True)


TABLE = ("run", "status", "step", "loss", "when", "why")


def row(run: dict[str, Any]) -> tuple[str, ...]:
    """What `TABLE` shows people of one of `read_runs`; the time is that of where they are."""
    when = run["time"] and datetime.datetime.fromisoformat(run["time"]).astimezone()
    return (
        run["run"],
        run["status"],
        "" if run["step"] is None else f"{run['step']}/{run['num_steps']}",
        "" if run["loss"] is None else f"{run['loss']:.4f}",
        f"{when:%Y-%m-%d %H:%M}" if when else "",
        run["why"],
    )


def alive(pid: int, born: int | None) -> bool:
    """Whether the process of that number on this machine, and no later one, still runs."""
    if os.name != "posix":
        return True  # it cannot be asked there without harm
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    state = _stat(pid)
    return state is None or (state[0] != "Z" and born in (None, state[1]))


def _stat(pid: int) -> tuple[str, int] | None:
    """The state of a process and when it began (proc(5), fields 3 and 22), where Linux says."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
