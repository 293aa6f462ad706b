"""A sweep on all cores of one machine: a few worker processes, each with cores of its own.

Models as small as a sweep's smallest keep no second core busy: its threads meet after every small
operation. Two processes of one core each train two of them in less time than one process of two
cores trains one. The workers share the sweep through its folder, as machines do.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import jax

from lineage_jax import sharding
from lineage_jax.train.progress import Progress
from scaling.sweep import Sweep, run

MOST = 4  # workers: each wants about a gigabyte
INHERITED = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def default_workers() -> int:
    """One for each core of a CPU, up to `MOST`; one where an accelerator does the work."""
    if jax.default_backend() != "cpu" or not hasattr(os, "sched_setaffinity"):
        return 1
    return min(MOST, len(os.sched_getaffinity(0)))


def share(
    spec: Callable[[], Sweep],
    folder: str | os.PathLike,
    progress: Progress,
    *,
    num_workers: int,
) -> None:
    """Trains every run of a sweep that is not finished, in `num_workers` processes.

    Each gets as many cores as any other, so that its results are those of any other, bit for bit.
    They end with this process, however it ends.

    Args:
      spec: makes the sweep; a function that can be imported by name.
      folder: of the sweep.
      progress: shows what all of them do.
      num_workers: how many.

    Raises:
      ChildProcessError: if a worker was killed.
      What a worker raised, if it was not.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    each = max(1, len(cores) // num_workers)
    settings = {name: getattr(jax.config, name) for name in INHERITED}
    spawn = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for i in range(num_workers):
        mine = [cores[(i * each + k) % len(cores)] for k in range(each)]
        ours, theirs = spawn.Pipe(duplex=False)
        arguments = (spec, os.fspath(folder), mine, settings, theirs)
        workers.append(spawn.Process(target=_work, args=arguments, daemon=True))
        workers[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        _listen(pipes, progress)
    finally:
        for worker in workers:
            worker.terminate()  # those that are done have ended already
            worker.join()


def _listen(pipes: list[Connection], progress: Progress) -> None:
    """Shows what the workers tell, until each has said that it is done."""
    bars: dict[str, Any] = {}
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                kind, *told = pipe.recv()
            except EOFError:
                raise ChildProcessError(
                    "a worker of the sweep was killed (is there memory left?); run the same"
                    " command again, and it goes on from here"
                ) from None
            if kind == "done":
                pipes.remove(pipe)
            elif kind == "error":
                raise told[0]
            else:
                _show(progress, bars, kind, *told)


def _show(progress: Progress, bars: dict[str, Any], kind: str, name: str, *told: Any) -> None:
    """Does to the shared display what a worker did to its own; equal names are one bar."""
    if kind == "say":
        progress.say(name)
    elif kind == "add" and name not in bars:
        bars[name] = progress.add(name, *told)
    elif kind == "update" and name in bars:
        progress.update(bars[name], *told)
    elif kind == "remove" and name in bars:
        progress.remove(bars.pop(name))


class Relay:
    """A `Progress` that tells the parent process; its tasks are their names."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def add(self, name: str, total: int) -> str:
        self.pipe.send(("add", name, total))
        return name

    def update(self, task: str, done: int, text: str = "") -> None:
        self.pipe.send(("update", task, done, text))

    def remove(self, task: str) -> None:
        self.pipe.send(("remove", task))

    def say(self, line: str) -> None:
        self.pipe.send(("say", line))


def _work(
    spec: Callable[[], Sweep],
    folder: str,
    cores: Sequence[int],
    settings: dict[str, Any],
    pipe: Connection,
) -> None:
    """A worker's process."""
    logging.disable(logging.CRITICAL)  # what goes wrong is raised, and told in one line
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before XLA counts them
    for name, value in settings.items():
        jax.config.update(name, value)
    relay: Any = Relay(pipe)
    try:
        run(spec(), folder, sharding.make_mesh(sharding.MeshConfig()), relay)
        pipe.send(("done",))
    except BrokenPipeError:  # no parent, no work
        return
    except BaseException as error:
        with contextlib.suppress(BrokenPipeError):
            pipe.send(("error", error))


def _end_with_parent() -> None:
    """Ends this process when its parent has, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
