"""Training processes that start fast, to be killed: `start(folder, ...)`."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lineage_jax.data import write_tokens
from lineage_jax.data.tokens import join
from lineage_jax.train import runs

SERVER = pathlib.Path(__file__).parent / "fork_server.py"
TINY = (  # noqa: SIM905
    "--model.num-layers 1 --model.embed-dim 16 --model.num-heads 2 --model.max-len 32 "
    "--data.seq-len 32 --data.batch-size 8 --data.heldout-fraction 0.2 --data.vocab-size 257 "
    "--train.num-steps 80 --train.eval-every 40 --train.checkpoint-every 4"
).split()
TEXT = "".join(
    f"{i} times {j} is {i * j}, and {i} more than {j} is {i + j}.\n"
    for i in range(20)
    for j in range(20)
)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of `TEXT`."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


class Process:
    """`lineage train gpt` in a process of its own, forked by a server."""

    def __init__(self, server, folder, arguments, traps, devices, name):
        self.folder, self._server = folder, server
        self.said_file = folder.with_name(f"{folder.name}{name}.said")
        self._before = len(self._all_said())
        order = {
            "arguments": ["train", "gpt", *arguments, "--run-dir", str(folder), "--resume"],
            "said": str(self.said_file),
            "environment": {
                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
            },
            "traps": traps,
        }
        self.pid = self._ask(order)

    def _all_said(self):
        return self.said_file.read_text() if self.said_file.exists() else ""

    @property
    def said(self):
        """What it has printed so far, and those before it of that name and folder have not."""
        return self._all_said()[self._before :]

    def wait(self):
        """The exit code."""
        return self._ask({"wait": self.pid})

    def _ask(self, order):
        print(json.dumps(order), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    @property
    def ended(self):
        return not runs.alive(self.pid, None)

    def until(self, happens):
        """Waits, looking every millisecond; whether it came before the process ended."""
        while not self.ended:
            if happens():
                return True
            time.sleep(0.001)
        return False


@pytest.fixture(scope="session")
def start(process_environment, tmp_path_factory):
    """Starts `lineage train gpt --resume` on a few tokens, as a `Process`."""
    tokens = tmp_path_factory.mktemp("data") / "tokens.parquet"
    lines = [np.frombuffer(line.encode(), np.uint8) for line in TEXT.splitlines(keepends=True)]
    write_tokens(join(lines, 256, None), tokens)
    environment = {**process_environment, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(SERVER)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def start(folder, *more, traps=None, devices=1, name=""):
            arguments = [*TINY, "--data.path", str(tokens), *more]
            return Process(server, folder, arguments, traps or {}, devices, name)

        yield start


@pytest.fixture(scope="session")
def uninterrupted(start, tmp_path_factory):
    """The folder of a run that nothing befell."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start(folder)
    assert process.wait() == 0, process.said
    return folder
