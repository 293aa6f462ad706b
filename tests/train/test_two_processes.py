"""Runs of several real processes: one run to whoever reads it, and it outlives any of them."""

import json
import resource
import signal
import socket
import time

import pytest

from lineage_jax.train import runs

pytestmark = pytest.mark.slow

FEW = ("--train.num-steps", "24", "--train.eval-every", "12", "--train.log-every", "4")
EVERY = 4  # steps between two checkpoints, as conftest.py has them
PATIENCE = 240  # seconds that nothing here takes, on a machine that is not busy


class Run:
    """The processes of one run, on devices of their own; as a context manager, killed at its end."""

    def __init__(self, start, folder, num_processes, devices, traps=None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.processes = folder, []
        for i in range(num_processes):
            others = ["--coordinator", address, "--num-processes", num_processes, "--process-id", i]
            arguments = [*FEW, *map(str, others if num_processes > 1 else ())]
            self.processes.append(
                start(folder, *arguments, devices=devices, traps=traps, name=f"-{i}")
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            if not process.ended:
                process.kill()

    def __getitem__(self, i):
        return self.processes[i]

    def until_saved(self, step):
        """Waits until that step, or a later one, has been saved."""
        self._until(lambda: last_saved(self.folder) >= step, lambda process: not process.ended)

    def codes(self, within=PATIENCE):
        """The exit codes, once all have ended."""
        self._until(lambda: all(p.ended for p in self.processes), lambda _: True, within)
        return [process.wait() for process in self.processes]

    def _until(self, happens, sound, within=PATIENCE):
        end = time.monotonic() + within
        while not happens():
            said = "\n".join(f"{i}: {p.said}" for i, p in enumerate(self.processes))
            assert time.monotonic() < end, f"not after {within} s:\n{said}"
            assert all(map(sound, self.processes)), f"one has ended:\n{said}"
            time.sleep(0.01)


def last_saved(folder):
    """The latest step whose checkpoint has its manifest."""
    found = (folder / "checkpoints" / "manifests").glob("*.json")
    return max((int(path.stem) for path in found), default=0)


def metrics(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def assert_same_losses(folder, other):
    """Step by step the same batches: float32 sums in another order differ in the seventh digit,
    other rows would in the second."""
    for mine, its in zip(metrics(folder), metrics(other), strict=True):
        mine, its = json.loads(mine), json.loads(its)
        assert (mine.keys(), mine["step"]) == (its.keys(), its["step"])
        for name in mine.keys() & {"loss", "eval_loss"}:
            assert mine[name] == pytest.approx(its[name], rel=1e-6)


def complaint(process):
    """The one line that a process ends in."""
    assert "Traceback" not in process.said
    (told,) = [line for line in process.said.splitlines() if line.startswith("lineage: ")]
    return told


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The folder of a run of one process on eight devices, that nothing befell."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with Run(start, folder, 1, 8) as run:
        assert run.codes() == [0], run[0].said
    return folder


@pytest.fixture(scope="module")
def pair(start, tmp_path_factory):
    """A run of two processes on four devices each, that nothing befell, and what they said."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    with Run(start, folder, 2, 4) as run:
        assert run.codes() == [0, 0], [process.said for process in run]
    return folder, [process.said for process in run]


def test_two_processes_are_one_run_to_whoever_reads_it(alone, pair):
    folder, (first, second) = pair
    assert_same_losses(folder, alone)
    assert [line for line in first.splitlines() if line.startswith("finished 24 steps")]
    for heard_of_the_first_alone in ("finished", "compiling", "step 12", "gpt 4/24"):
        assert first.count(heard_of_the_first_alone) == 1
        assert heard_of_the_first_alone not in second
    assert runs.read_status(folder).status == "finished"
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [
        "00000012.txt",
        "00000024.txt",
    ]


def test_a_sigterm_of_either_is_the_end_of_both_with_the_same_step_saved(tmp_path, start, pair):
    folder = tmp_path / "run"
    for told in (1, 0):
        with Run(start, folder, 2, 4, traps={"slow_data": 0.05}) as run:
            run.until_saved(last_saved(folder) + EVERY)
            run[told].kill(signal.SIGTERM)
            assert run.codes() == [75, 75]
        status = runs.read_status(folder)
        assert (status.status, status.step) == ("preempted", last_saved(folder))
        assert status.step < 24
    with Run(start, folder, 2, 4) as run:
        assert run.codes() == [0, 0]
    assert metrics(folder) == metrics(pair[0])  # to the last digit: on the same mesh


def test_a_process_that_is_killed_ends_the_others_and_any_number_go_on(tmp_path, start, alone):
    folder = tmp_path / "run"
    for num_processes, devices, killed in ((2, 4, 0), (4, 2, 2), (2, 4, 1)):
        with Run(start, folder, num_processes, devices, traps={"slow_data": 0.05}) as run:
            run.until_saved(last_saved(folder) + EVERY)
            run[killed].kill()
            codes = run.codes(within=20)  # of which jax's own watch takes a hundred
        for i, code in enumerate(codes):
            assert code == (-signal.SIGKILL if i == killed else 1)
            if i != killed:
                told = complaint(run[i])
                assert f"lineage: process {killed} ({socket.gethostname()}) has gone at" in told
                assert "start all processes again with --resume" in told
        if killed:
            status = runs.read_status(folder)
            assert (status.status, f"process {killed} " in status.why) == ("failed", True)
        assert last_saved(folder) < 24
    with Run(start, folder, 1, 8) as run:
        assert run.codes() == [0]
    assert "resumed from step" in run[0].said
    assert_same_losses(folder, alone)


def test_the_error_of_one_process_is_told_by_all(tmp_path, start):
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux takes room away from a process that runs")
    folder = tmp_path / "run"
    with Run(start, folder, 2, 4, traps={"slow_data": 0.05}) as run:
        run.until_saved(EVERY)
        resource.prlimit(run[0].pid, resource.RLIMIT_FSIZE, (0, 0))  # to write is error EFBIG
        assert run.codes(within=20) == [1, 1]
    own = complaint(run[0]).removeprefix("lineage: ")
    assert "cannot save a checkpoint" in own
    assert complaint(run[1]) == f"lineage: process 0 ({socket.gethostname()}) has failed: {own}"
