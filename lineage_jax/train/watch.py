"""The watch that the processes of a run keep over one another, so that all end when one does.

A process that is gone leaves the others in a collective that never returns. Each holds a connection
to process 0 on which nothing is said until the end: one that closes before that, or whose other end
the system cannot reach any more, is a process that is gone, whatever this one is waiting for.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from jax._src.distributed import global_state  # what jax.distributed has found out; no public way

SILENCE_SECONDS = 30
"""Silence of the network after which a process counts as gone."""
NOTICE_SECONDS = 1
"""How much later than by an error of its own a process may hear that another is gone."""
PATIENCE_SECONDS = 5
"""What the end of a process waits for at most: its status to be written, the others to end."""
EXIT_LOST = 1
DONE = "done"
"""What a process says at its end; one that fails says why instead."""


class Run(Protocol):
    """What the watch asks of the loop."""

    step: int

    def status(self, status: str, why: str = "") -> None: ...


class Watch:
    """Ends this process, with one line that says why, once another of its run is gone.

    Use as a context manager around all that the processes do together. Leaving it waits until each
    has come so far; leaving it by an error tells the others, and they end too.

    Attributes:
      run: whose status is written down if a process is gone, once there is one.
    """

    def __init__(self, exit_code: Callable[[BaseException], int]):
        """Watches nothing yet.

        Args:
          exit_code: of a process that ends in that error.
        """
        self.run: Run | None = None
        self._exit_code = exit_code
        self._me = f"process {global_state.process_id} ({socket.gethostname()})"
        self._links: list[socket.socket] = []
        self._listeners: list[threading.Thread] = []
        self._noticed = threading.Event()
        self._verdict = threading.Lock()  # of who says how this process ends: taken once

    def __enter__(self) -> "Watch":
        if global_state.num_processes > 1:
            self._meet()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._links:
            return
        if error is None or isinstance(error, SystemExit):  # all end so, or none
            if global_state.process_id == 0:
                self._listen_to_the_end()
                self._say(DONE)
            else:
                self._say(DONE)
                self._listen_to_the_end()
            return
        # Where another's end broke a collective, the listener hears of it too, and says more.
        if self._noticed.wait(NOTICE_SECONDS) or not self._verdict.acquire(blocking=False):
            threading.Event().wait()  # it ends this process
        told = " ".join(str(error).split())[:500] or type(error).__name__
        self._say(f"{self._me} has failed: {told}")
        atexit.register(self._leave, self._exit_code(error))

    def _meet(self) -> None:
        """Connects each process with process 0.

        Raises:
          OSError: if one does not reach it.
        """
        host, key = (global_state.coordinator_address or "").rpartition(":")[0], "lineage_jax/watch"
        client, deadline = global_state.client, SILENCE_SECONDS
        assert client is not None
        try:
            if global_state.process_id == 0:
                with _server() as server:
                    server.settimeout(deadline)
                    client.key_value_set(key, str(server.getsockname()[1]))
                    met = [server.accept()[0] for _ in range(global_state.num_processes - 1)]
            else:
                port = int(client.blocking_key_value_get(key, deadline * 1000))
                met = [socket.create_connection((host.strip("[]"), port), timeout=deadline)]
        except OSError as error:
            atexit.register(self._leave, EXIT_LOST)
            raise OSError(
                f"the processes do not reach process 0 at {host} ({error}); let them connect to "
                "any port of it"
            ) from error
        _abort_late()
        for link in met:
            _keep_alive(link)
            self._links.append(link)
            _send(link, self._me)
        for link in met:
            listener = threading.Thread(target=self._listen, args=(link,), daemon=True)
            listener.start()
            self._listeners.append(listener)

    def _listen(self, link: socket.socket) -> None:
        """Waits for the word of one other process, or its end."""
        name = word = ""
        try:
            with link.makefile(encoding="utf-8", errors="replace") as lines:
                name = lines.readline().strip()
                word = lines.readline().strip()
        except OSError:  # the network is silent
            pass
        if word != DONE:
            self._lose(word or self._gone(name or "another process"))

    def _gone(self, name: str) -> str:
        step = "" if self.run is None else f" at step {self.run.step}"
        return (
            f"{name} has gone{step}; start all processes again with --resume: the run goes on from "
            "its last checkpoint"
        )

    def _lose(self, why: str) -> None:
        """Ends this process, unless it does so itself: another is gone."""
        if not self._verdict.acquire(blocking=False):
            return
        self._noticed.set()
        self._say(why)
        with contextlib.suppress(OSError):  # nobody may be there to read it
            print(f"lineage: {why}", file=sys.stderr, flush=True)
        if self.run is not None:
            writing = threading.Thread(target=self.run.status, args=("failed", why), daemon=True)
            writing.start()
            writing.join(PATIENCE_SECONDS)  # the folder may be gone with the network
        self._leave(EXIT_LOST)

    def _leave(self, code: int) -> None:
        """Ends at once: at an ordinary end jax would wait for the others."""
        if global_state.process_id == 0:  # jax breaks off the others as soon as this one is gone
            end = time.monotonic() + PATIENCE_SECONDS
            for listener in self._listeners:
                if listener is not threading.current_thread():
                    listener.join(max(0.0, end - time.monotonic()))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _listen_to_the_end(self) -> None:
        for listener in self._listeners:
            listener.join()

    def _say(self, word: str) -> None:
        """Tells the others: process 0 all of them, the others it alone."""
        for link in self._links:
            with contextlib.suppress(OSError):  # it is gone, and its listener knows
                _send(link, word)


def _server() -> socket.socket:
    """Listens at a port of the system's choice."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _send(link: socket.socket, line: str) -> None:
    link.sendall(f"{line}\n".encode())


def _abort_late() -> None:
    """Makes an abort of this process wait for `sleep(SIGABRT)`, which is six seconds.

    jax's own client aborts, with no word for people, some 50 ms after process 0 has closed its end:
    the listener hears of that too, and comes first.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _keep_alive(link: socket.socket) -> None:
    """Lets the system ask whether the other end is there, and fail reads after a silence."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_SECONDS // 3)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_SECONDS // 6)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)
