"""What a person sees while long work runs: a bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

import jax
from rich import progress
from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Nested tasks with a bar each on a terminal; elsewhere a line now and then. Process 0 only.

    Use as a context manager.
    """

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._silent = jax.process_index() != 0
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            progress.TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
            disable=self._silent or not self._console.is_terminal,
        )
        self._spoke: dict[progress.TaskID, float] = {}

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def add(self, name: str, total: int) -> progress.TaskID:
        """A new task of `total` units of work."""
        return self._bars.add_task(name, total=total, text="")

    def update(self, task: progress.TaskID, done: int, text: str = "") -> None:
        """Says how far a task is; `text` is shown beside it."""
        self._bars.update(task, completed=done, text=text)
        now, total = time.monotonic(), self._bars.tasks[task].total
        if self._silent or self._console.is_terminal:
            return
        if done == total or now - self._spoke.get(task, 0.0) > SECONDS_BETWEEN_LINES:
            self._spoke[task] = now
            self._console.print(f"{self._bars.tasks[task].description} {done}/{total}  {text}")

    def remove(self, task: progress.TaskID) -> None:
        """Takes a finished task's bar away."""
        self._bars.update(task, visible=False)

    def say(self, line: str) -> None:
        """A line that stays, above the bars."""
        if not self._silent:
            self._console.print(line, markup=False)
