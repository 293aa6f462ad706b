"""Real runs whose process, disk or gradients fail: nothing is lost, and one line says what was."""

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lineage_jax.train import runs

pytestmark = pytest.mark.slow

EVERY = 4  # steps between two checkpoints, as conftest.py has them


def metrics(folder):
    """The lines of metrics.jsonl: to the last digit what was learned."""
    return (folder / "metrics.jsonl").read_text().splitlines()


def last_saved(folder):
    """The latest step whose checkpoint has its manifest."""
    found = (folder / "checkpoints" / "manifests").glob("*.json")
    return max((int(path.stem) for path in found), default=0)


def saving(folder, since):
    """Whether a checkpoint that was begun after that time has no manifest yet."""
    with contextlib.suppress(FileNotFoundError):  # the folder itself, or one that is just renamed
        for path in (folder / "checkpoints" / "steps").iterdir():
            if path.stat().st_mtime > since and int(path.name.split(".")[0]) > last_saved(folder):
                return True
    return False


def complaint(process):
    """The one line that a run which failed ends in."""
    assert "Traceback" not in process.said
    (told,) = [line for line in process.said.splitlines() if line.startswith("lineage: ")]
    return told


def test_a_run_killed_at_20_random_moments_loses_nothing(tmp_path, start, uninterrupted):
    seed = 20
    print(f"moments of seed {seed}:")
    chance = random.Random(seed)
    moments = ["starting"] * 4 + ["training"] * 8 + ["saving"] * 8
    chance.shuffle(moments)
    folder, in_saves = tmp_path / "run", 0
    for moment in moments:
        began = time.time()
        process = start(folder, traps={"slow_data": 0.01})
        if moment != "starting":
            goal = last_saved(folder) + EVERY * chance.randint(0, 1)
            process.until(lambda goal=goal: last_saved(folder) >= goal)
        if moment == "saving":
            process.until(lambda began=began: saving(folder, began))
        time.sleep(chance.uniform(0, {"starting": 1.5, "training": 0.05, "saving": 0.02}[moment]))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.said
        hit = saving(folder, began)
        in_saves += hit
        print(
            f"{moment}, {time.time() - began:.2f} s on, at {last_saved(folder)}, in a save: {hit}"
        )
        if (folder / runs.FILE).exists():
            assert runs.read_status(folder).status == "killed"
    assert in_saves >= 5
    process = start(folder)
    assert process.wait() == 0, process.said
    assert "resumed from step" in process.said
    assert metrics(folder) == metrics(uninterrupted)


def test_a_sigterm_while_it_compiles_steps_or_evaluates_saves_and_exits_75(
    tmp_path, start, uninterrupted
):
    folder = tmp_path / "run"

    def preempted(process):
        process.kill(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait() == 75, process.said
        status = runs.read_status(folder)
        assert status.status == "preempted"
        assert last_saved(folder) == status.step
        return status.step, time.monotonic() - began

    process = start(folder, traps={"no_cache": True})
    assert process.until(lambda: "compiling" in process.said)
    assert preempted(process)[0] == 0

    process = start(folder, traps={"slow_data": 0.01})
    assert process.until(lambda: last_saved(folder) >= 2 * EVERY)
    assert 2 * EVERY <= preempted(process)[0] < 40

    process = start(folder, traps={"slow_evaluation": 10.0})
    assert process.until(lambda: "evaluating" in process.said)
    step, seconds = preempted(process)
    assert step == 40
    assert seconds < 20  # it has two batches or more: one is waited for, not all
    assert not any("eval_loss" in line for line in metrics(folder))

    process = start(folder)
    assert process.wait() == 0, process.said
    assert metrics(folder) == metrics(uninterrupted)


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of that size, and a function that makes it larger."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if (
        not sys.platform.startswith("linux")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("a small file system can be mounted on Linux by root only")
    try:
        yield lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(folder)], check=True
        )
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    tmp_path, start, uninterrupted
):
    folder = tmp_path / "disk" / "run"
    folder.parent.mkdir()
    with small_disk(folder.parent, "700k") as make_room:
        process = start(folder)
        assert process.wait() == 1, process.said
        saved = last_saved(folder)
        assert "cannot save a checkpoint" in complaint(process)
        assert "no space left" in complaint(process)
        assert f"the last whole one is step {saved};" in complaint(process)
        status = runs.read_status(folder)
        assert (status.status, "no space left" in status.why) == ("failed", True)
        make_room("50m")
        process = start(folder)
        assert process.wait() == 0, process.said
        assert f"resumed from step {saved}" in process.said
        assert metrics(folder) == metrics(uninterrupted)


def test_a_disk_that_takes_no_more_in_the_middle_of_a_run_leaves_what_was_saved(
    tmp_path, start, uninterrupted
):
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux takes room away from a process that runs")
    folder = tmp_path / "run"
    process = start(folder, traps={"slow_data": 0.01})
    assert process.until(lambda: last_saved(folder) >= 2 * EVERY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))  # to write is error EFBIG
    assert process.wait() == 1, process.said
    process = start(folder)
    assert process.wait() == 0, process.said
    assert "passed over" not in process.said
    assert metrics(folder) == metrics(uninterrupted)


def test_gradients_that_are_not_finite_are_skipped_and_counted_until_they_are_too_many(
    tmp_path, start
):
    folder, limits = tmp_path / "run", ["--train.max-skipped", "3"]
    process = start(folder, *limits, traps={"nan_gradients": [1, 4, 5, 8, 9, 10, 11]})
    assert process.wait() == 1, process.said
    told = complaint(process)
    assert "the loss or gradient of 4 steps in a row, up to step 12, was not finite" in told
    assert "batches 8 to 11 of data seed 0" in told
    lines = map(json.loads, metrics(folder))
    assert [line["step"] for line in lines if line.get("skipped")] == [2, 5, 6, 9, 10, 11, 12]
    status = runs.read_status(folder)
    assert (status.status, status.step) == ("failed", 12)
    assert "4 steps in a row" in status.why
    before, after = (saved(folder, step) for step in (8, 12))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    process = start(folder, *limits)  # the batches after those are sound
    assert process.wait() == 0, process.said
    assert "resumed from step 12" in process.said


def saved(folder, step):
    """What a checkpoint holds but for its counters: name -> array."""
    place = folder / "checkpoints" / "steps" / str(step) / "default"
    with warnings.catch_warnings(action="ignore"), ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(place)
    state = {name: state[name] for name in ("params", "extra", "opt_state")}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_run_goes_on_on_another_mesh_with_the_same_data(tmp_path, start):
    few = ["--train.num-steps", "24"]

    def killed(folder, *options, devices):
        process = start(folder, *options, devices=devices, traps={"slow_data": 0.05})
        step = last_saved(folder) + EVERY
        assert process.until(lambda: last_saved(folder) >= step), process.said
        process.kill()
        process.wait()

    def finished(folder, *options, devices):
        process = start(folder, *options, devices=devices)
        assert process.wait() == 0, process.said
        return folder

    same, moved = tmp_path / "same", tmp_path / "moved"
    whole = finished(tmp_path / "whole", *few, devices=8)
    killed(same, *few, devices=8)
    shutil.copytree(same, moved)
    finished(same, *few, devices=8)
    assert metrics(same) == metrics(whole)

    killed(moved, *few, "--mesh.fsdp", "4", "--mesh.tensor", "2", devices=8)
    finished(moved, *few, devices=1)
    for before, after in zip(metrics(whole), metrics(moved), strict=True):
        before, after = json.loads(before), json.loads(after)
        assert before["step"] == after["step"]
        for name in before.keys() & {"loss", "eval_loss"}:
            # float32 sums in another order: other batches would differ in the second digit.
            assert after[name] == pytest.approx(before[name], rel=1e-6)
