"""The processes of a run on several machines: how they find one another, and agree to stop."""

import dataclasses
import glob
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

JOIN_SECONDS = 300.0
"""How long a process waits for the others to begin; as long as jax does."""


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

    Ends the process, with one line that says so, if the others do not come.
    """
    if options.coordinator is None and cluster(os.environ, tpu=on_tpu()) is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    late = threading.Timer(JOIN_SECONDS, _end_alone, args=(options,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            initialization_timeout=int(2 * JOIN_SECONDS) + 1,  # jax aborts then, and shows a stack
        )
    finally:
        late.cancel()


def _end_alone(options: ProcessOptions) -> None:
    wanted = options.num_processes or "all the"
    where = f" at {options.coordinator}" if options.coordinator else ""
    print(
        f"lineage: wanted {wanted} processes{where}, but some have not come in {JOIN_SECONDS:.0f} "
        "s; start all of them with the same --coordinator, which each must be able to reach",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


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


class Interruption:
    """Notes a SIGTERM, so that the loop can save and leave at the next step.

    Of several processes any may get it. They agree on the moment through the service that joins
    them, without a word on the devices' network: each asks as often as the others, and at the first
    question that none has passed yet all are told so.
    """

    def __enter__(self) -> "Interruption":
        self._noted, self._questions = False, 0
        self._old = None
        # With others, jax's service has a handler of its own, which must stay.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def asked(self) -> bool:
        """Whether to leave now; the same answer in every process."""
        if jax.process_count() > 1 and not self._noted:
            self._questions += 1
            self._noted = multihost_utils.reached_preemption_sync_point(self._questions)
        return self._noted

    def _note(self, number: int, frame: Any) -> None:
        self._noted = True


def first_says(word: bool) -> bool:
    """What process 0 says, in every process."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(word)))
