"""A process knows whether it is one of several, and refuses to be told half of it."""

import threading

import jax
import pytest

from lineage_jax.train import processes
from lineage_jax.train.processes import ProcessOptions, cluster

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environ", "tpu", "found"),
    [
        ({}, False, None),
        ({}, True, "Cloud TPU"),
        (SLURM | {"SLURM_NTASKS": "2"}, False, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False, None),  # a batch script, not its srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, False, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
    ],
)
def test_a_cluster_is_known_by_what_it_sets(environ, tpu, found):
    assert cluster(environ, tpu=tpu) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(coordinator="a:1"), "go together: wanted all three or none, got a:1, None, None"),
        (dict(num_processes=2, process_id=0), "go together"),
        (dict(coordinator="a", num_processes=2, process_id=0), "wanted HOST:PORT, got 'a'"),
        (dict(coordinator="a:x", num_processes=2, process_id=0), "wanted HOST:PORT, got 'a:x'"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "got 2 of 2"),
    ],
)
def test_half_of_what_a_process_must_know_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProcessOptions(**options)


def test_a_process_whose_others_do_not_come_ends_and_says_so(monkeypatch, capsys):
    ended, codes = threading.Event(), []
    monkeypatch.setattr(processes, "JOIN_SECONDS", 0.01)
    monkeypatch.setattr(processes.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *of, **others: ended.wait(60))
    processes.join(ProcessOptions(coordinator="a:1", num_processes=2, process_id=1))
    assert codes == [1]
    assert "lineage: wanted 2 processes at a:1, but some have not come" in capsys.readouterr().err
