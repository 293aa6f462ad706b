"""The processes of a run on several machines: how they find one another."""

import dataclasses
import glob
import importlib.util
import os
from collections.abc import Mapping

import jax

HEARTBEAT_SECONDS = 30
"""Silence after which a process counts as dead, and the others end; jax waits for 100."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Where the other processes are; on Cloud TPU, GKE, SLURM and Open MPI nothing need be said."""

    coordinator: str | None = None
    """HOST:PORT of process 0, any free port; the same for all."""
    num_processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    def __post_init__(self):
        told = (self.coordinator, self.num_processes, self.process_id)
        if any(x is None for x in told) and any(x is not None for x in told):
            raise ValueError(
                "--coordinator, --num-processes and --process-id go together: wanted all three or "
                f"none, got {self.coordinator}, {self.num_processes}, {self.process_id}"
            )
        if self.coordinator is not None:
            host, colon, port = self.coordinator.rpartition(":")
            if not (host and colon and port.isdigit()):
                raise ValueError(f"coordinator: wanted HOST:PORT, got {self.coordinator!r}")
            if not 0 <= (self.process_id or 0) < (self.num_processes or 0):
                raise ValueError(
                    f"process_id: wanted 0 to num_processes - 1, got {self.process_id} of "
                    f"{self.num_processes}"
                )


def join(options: ProcessOptions) -> None:
    """Joins this process to the others of its run, if there are any; no device may be in use yet.

    Raises:
      RuntimeError: if the others do not come within five minutes.
    """
    if options.coordinator is None and cluster(os.environ, tpu=on_tpu()) is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        options.coordinator,
        options.num_processes,
        options.process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def cluster(environ: Mapping[str, str], *, tpu: bool) -> str | None:
    """What started this process beside others, where jax can ask it who they are; None if alone.

    Args:
      environ: the environment's variables.
      tpu: whether there is a TPU here.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and all(name in environ for name in slurm):
        return "SLURM"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if tpu:  # of one host too: jax asks the machine's metadata how many there are
        return "Cloud TPU"
    return None


def on_tpu() -> bool:
    """Whether this machine has TPU chips, and the library that drives them."""
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return bool(chips) and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None
