"""A sweep gives the same results however often it is killed, and however many share it."""

import functools
import importlib.util
import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lineage_jax.train.progress import Progress
from scaling.runs import read_runs
from scaling.sweep import Folder, Trial, abandoned, alive, best_octave, next_octaves, take
from scaling.workers import share

SCRIPT = pathlib.Path(__file__).parent / "tiny_sweep.py"
spec = importlib.util.spec_from_file_location("tiny_sweep", SCRIPT)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture(scope="session")
def start(process_environment):
    """Starts the tiny sweep in a process of its own.

    Compiled well: a dozen processes run what the first one compiles.
    """
    environment = {**process_environment, "XLA_FLAGS": ""}

    def start(folder, num_workers=1, lanes=1):
        with open(f"{folder}.said", "w") as said:
            return subprocess.Popen(
                [sys.executable, str(SCRIPT), *map(str, (folder, num_workers, lanes))],
                env=environment,
                stdout=said,
                stderr=said,
            )

    return start


@pytest.fixture(scope="session")
def whole(tmp_path_factory, start):
    """The sweep, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    assert start(folder).wait() == 0, pathlib.Path(f"{folder}.said").read_text()
    return folder


@pytest.mark.slow
def test_every_size_has_every_budget_at_its_best_learning_rate(whole):
    runs = read_runs(whole / "results.csv", duplicates="keep")
    for name in set(runs["model"]):
        mine = runs["model"] == name
        tuned = mine & (runs["tokens"] == 50 * 512)  # at the second of its budgets
        best = runs["learning_rate"][tuned][np.argmin(runs["loss"][tuned])]
        at_best = mine & (runs["learning_rate"] == best)
        assert at_best.sum() == 3
        assert runs["learning_rate"][mine].min() < best < runs["learning_rate"][mine].max()


@pytest.mark.slow
def test_three_kills_at_random_moments_change_no_bit_of_the_results(whole, start, tmp_path):
    moments, folder = random.Random(1), tmp_path / "sweep"
    began = time.monotonic()
    for _ in range(3):
        process = start(folder)
        points = len(list(folder.glob("points/*.json")))
        while len(list(folder.glob("points/*.json"))) < points + 2 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert time.monotonic() - began < 600
    assert start(folder).wait() == 0
    assert (folder / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


@pytest.mark.slow
def test_two_workers_share_a_sweep_and_agree_with_one(whole, start, tmp_path):
    folder = tmp_path / "sweep"
    workers = [start(folder), start(folder)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert (folder / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


@pytest.mark.slow
def test_workers_of_one_command_end_with_it_and_agree_with_one(whole, start, tmp_path):
    folder = tmp_path / "sweep"
    process = start(folder, num_workers=2)
    began = time.monotonic()
    while not (claims := list(folder.glob("claims/*"))) and time.monotonic() - began < 200:
        time.sleep(0.05)
    workers = {json.loads(path.read_text())["pid"] for path in claims}
    assert workers and process.pid not in workers
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(map(alive, workers)) and time.monotonic() - began < 300:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    assert start(folder, num_workers=2).wait() == 0
    assert (folder / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops", "error", "message"),
    [
        (functools.partial(int, "no sweep"), ValueError, "invalid literal"),
        (functools.partial(os._exit, 3), ChildProcessError, "a worker of the sweep was killed"),
    ],
)
def test_what_stops_a_worker_stops_the_command_and_all_workers(tmp_path, stops, error, message):
    with Progress() as progress, pytest.raises(error, match=message):
        share(stops, tmp_path, progress, num_workers=2)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_damaged_state_is_trained_again(whole, start, tmp_path):
    import shutil

    folder = tmp_path / "sweep"
    shutil.copytree(whole, folder)
    for path in folder.glob("points/*-100.json"):
        path.unlink()
    for path in folder.glob("trials/*/steps/*/default/d/*"):
        path.write_bytes(b"junk")
    assert start(folder).wait() == 0
    assert (folder / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


@pytest.mark.slow
def test_learning_rates_tuned_in_lanes_give_the_same_losses(whole, start, tmp_path):
    folder = tmp_path / "sweep"
    assert start(folder, lanes=3).wait() == 0
    lanes, turns = (losses_at_stable_rates(each) for each in (folder, whole))
    assert lanes == pytest.approx(turns, rel=1e-5)


def losses_at_stable_rates(folder):
    """By run; at the highest rate, above the best one, training amplifies what rounding differs."""
    runs = read_runs(folder / "results.csv", duplicates="keep")
    stable = runs["learning_rate"] < runs["learning_rate"].max()
    return dict(zip(runs["run_id"][stable], runs["loss"][stable], strict=True))


@pytest.mark.slow
def test_a_folder_with_another_sweep_is_refused(whole):
    with pytest.raises(ValueError, match="holds another sweep"):
        Folder(whole, tiny.tiny_sweep(seed=1))


@pytest.mark.parametrize(
    "losses, tried_next",
    [
        ({}, [0, -1, 1]),
        ({0: 2.0, -1: 1.9}, [1]),
        ({0: 2.0, -1: 2.1, 1: 2.2}, []),
        ({0: 2.0, -1: 2.1, 1: 1.9}, [2]),
        ({0: 2.0, -1: 1.9, 1: 2.2}, [-2]),
        ({0: 2.0, -1: 2.1, 1: float("nan")}, []),
        (
            {0: 1.4, -1: 1.5, 1: 1.3, 2: 1.2, 3: 1.1, 4: 1.0},
            [],
        ),  # the best is at the limit: no further
    ],
)
def test_a_learning_rate_is_best_when_both_neighbours_are_worse(losses, tried_next):
    assert next_octaves(losses) == tried_next


def test_of_equal_losses_the_lower_rate_is_best():
    assert best_octave({0: 2.0, 1: 2.0, -1: float("nan")}) == 0


def test_a_claim_is_held_by_one(tmp_path):
    claim = tmp_path / "claim"
    assert take(claim)
    owner = json.loads(claim.read_text())
    claim.write_text(json.dumps({**owner, "pid": os.getppid()}))  # alive, and not this process
    assert not take(claim)


def test_a_claim_of_a_dead_process_is_taken_over(tmp_path):
    claim = tmp_path / "claim"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    take(claim)
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "pid": dead.pid}))
    assert abandoned(claim)
    assert take(claim)


def test_a_claim_of_another_machine_is_taken_over_when_it_has_been_silent(tmp_path):
    claim = tmp_path / "claim"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert not take(claim)
    os.utime(claim, (0, 0))
    assert take(claim)


def test_budgets_that_are_not_whole_chunks_are_refused():
    import dataclasses

    sweep = tiny.tiny_sweep()
    odd = dataclasses.replace(sweep.sizes[0], budgets=(20, 55))
    with pytest.raises(ValueError, match="multiples of 10 steps"):
        dataclasses.replace(sweep, sizes=(odd,))
    assert Trial(sweep.sizes[0], 0.01).name.startswith(sweep.sizes[0].name)
