"""Runs of several real processes: one run to whoever reads it, and it outlives any of them."""

import json
import signal
import socket
import time

import pytest

from lineage_jax.train import runs

pytestmark = pytest.mark.slow

LAST = 32
FEW = (
    f"--train.num-steps {LAST} --train.eval-every {LAST} --train.log-every 4 "
    "--data.heldout-fraction 0.05"
).split()
EVERY = 4  # steps between two checkpoints, as conftest.py has them
SLOW = {"slow_data": 0.5}  # so that a SIGTERM is heard of and agreed on long before the last step
UNREADABLE = "the batch of step 2 cannot be read"
HOST = socket.gethostname()
PATIENCE = 240  # seconds that nothing here takes, on a machine that is not busy


class Run:
    """The processes of one run, each with so many devices; leaving its context kills them."""

    def __init__(self, start, folder, num_processes, devices, *, traps=None, trapped=range(4)):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.processes = folder, []
        for i in range(num_processes):
            others = ["--coordinator", address, "--num-processes", num_processes, "--process-id", i]
            arguments = [*FEW, *map(str, others if num_processes > 1 else ())]
            self.processes.append(
                start(
                    folder,
                    *arguments,
                    devices=devices,
                    traps=traps if i in trapped else None,
                    name=f"-{i}",
                )
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


def test_a_sigterm_of_either_saves_the_same_step_of_both_and_they_go_on_as_one(
    tmp_path, start, alone
):
    folder = tmp_path / "run"
    for told in (1, 0):
        with Run(start, folder, 2, 4, traps=SLOW) as run:
            run.until_saved(last_saved(folder) + EVERY)
            run[told].kill(signal.SIGTERM)
            assert run.codes() == [75, 75]
        status = runs.read_status(folder)
        assert (status.status, status.step) == ("preempted", last_saved(folder))
        assert status.step < LAST
    with Run(start, folder, 2, 4) as run:
        assert run.codes() == [0, 0]
    assert_same_losses(folder, alone)
    assert runs.read_status(folder).status == "finished"
    for told_once in (
        "resumed from step",
        "compiling",
        f"gpt {LAST}/{LAST}",
        f"step {LAST}: ",
        f"finished {LAST}",
    ):
        assert run[0].said.count(told_once) == 1
        assert told_once not in run[1].said


def test_a_process_that_is_killed_ends_the_others_and_any_number_go_on(tmp_path, start, alone):
    folder = tmp_path / "run"
    for num_processes, devices, killed in ((2, 4, 0), (4, 2, 1)):
        with Run(start, folder, num_processes, devices, traps=SLOW) as run:
            run.until_saved(last_saved(folder) + EVERY)
            run[killed].kill()
            codes = run.codes(within=25)  # jax notices after a hundred
        for i, code in enumerate(codes):
            assert code == (-signal.SIGKILL if i == killed else 1)
            if i != killed:
                told = complaint(run[i])
                assert told.startswith(f"lineage: process {killed} ({HOST}) has gone at step ")
                assert "start all processes again with --resume" in told
        if killed:
            status = runs.read_status(folder)
            assert (status.status, f"process {killed} " in status.why) == ("failed", True)
        assert last_saved(folder) < LAST
    with Run(start, folder, 1, 8) as run:
        assert run.codes() == [0]
    assert "resumed from step" in run[0].said
    assert_same_losses(folder, alone)


def test_the_error_of_one_process_is_told_by_all(tmp_path, start):
    with Run(start, tmp_path / "run", 2, 4, traps={"failing_data": 2}, trapped=[0]) as run:
        assert run.codes() == [1, 1]
    assert complaint(run[0]) == f"lineage: {UNREADABLE}"
    assert complaint(run[1]) == f"lineage: process 0 ({HOST}) has failed: {UNREADABLE}"
