"""`lineage runs` tells how each run stands, and which of those "running" are no more."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from lineage_jax import cli
from lineage_jax.train import runs

NOW = runs.status_now("running", 30, 60, loss=1.25)


def write(folder, **changes):
    folder.mkdir(parents=True)
    status = dataclasses.replace(NOW, **changes)
    (folder / runs.FILE).write_text(json.dumps(dataclasses.asdict(status)))
    return folder


def test_a_run_whose_process_lives_is_running(tmp_path):
    assert runs.read_status(write(tmp_path / "a")) == NOW


def test_a_run_whose_process_was_killed_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder = write(tmp_path / "a", pid=process.pid, born=None)
    assert runs.read_status(folder).status == "running"
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if sys.platform.startswith("linux"):  # dead, though its parent has not asked how it ended
        assert runs.read_status(folder).status == "killed"
    process.wait()
    process.stdin.close()
    told = runs.read_status(folder)
    assert (told.status, told.step) == ("killed", 30)
    assert "--resume" in told.why


@pytest.mark.skipif(NOW.born is None, reason="this system does not say when a process began")
def test_a_later_process_of_the_same_number_is_not_the_run(tmp_path):
    assert runs.read_status(write(tmp_path / "a", born=NOW.born - 1)).status == "killed"


def test_a_process_of_another_host_is_believed(tmp_path):
    folder = write(tmp_path / "a", host="elsewhere", born=1, pid=2**22 + 1)
    assert runs.read_status(folder).status == "running"


@pytest.mark.parametrize("status", ["finished", "preempted", "failed"])
def test_a_run_that_has_ended_stays_as_it_ended(tmp_path, status):
    told = runs.read_status(write(tmp_path / "a", status=status, why="told", born=1))
    assert (told.status, told.why) == (status, "told")


def test_the_runs_of_a_folder_come_latest_first_and_damaged_ones_are_named(tmp_path):
    write(tmp_path / "old", status="finished", time="2020-01-01T00:00:00+00:00")
    write(tmp_path / "new")
    (write(tmp_path / "odd") / runs.FILE).write_text('{"status": ')
    (tmp_path / "no run").mkdir()
    found = {row["run"].rpartition("/")[2]: row for row in runs.read_runs(tmp_path)}
    assert list(found) == ["new", "old", "odd"]
    assert found["odd"]["status"] == "unknown"
    assert "STATUS.json: wanted the status of a run" in found["odd"]["why"]
    (only,) = runs.read_runs(tmp_path / "new")  # a run is a folder of one run
    assert only == found["new"]


def test_lineage_runs_is_a_table_or_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path / "runs" / "good", status="finished", step=60)
    write(tmp_path / "runs" / "bad", status="failed", why="no space left on device", loss=None)
    cli.main(["runs"])
    table = capsys.readouterr().out
    for said in ("runs/good", "finished", "60/60", "1.2500", "runs/bad", "failed", "no space left"):
        assert said in table
    cli.main(["runs", "runs/good", "--json"])
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["run"], told["status"], told["loss"]) == ("runs/good", "finished", 1.25)


@pytest.mark.parametrize(
    "arguments, told", [(["nowhere"], "nowhere: no such folder"), (["--jsn"], "--json")]
)
def test_what_lineage_runs_cannot_read_is_one_line(arguments, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["runs", *arguments])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert told in said[0]


def test_a_folder_without_runs_says_so(tmp_path, capsys):
    cli.main(["runs", str(tmp_path)])
    assert "no runs in" in capsys.readouterr().out
