"""Compiles a training step for a slice that need not exist, in a process of its own.

libtpu reads its flags once, when it is loaded, keeps what it took of memory, and ends the process
on some errors: so each compilation has a process, which a search starts as often as it likes.

The compiler first optimises the program as a whole, for seconds: what each device does and sends,
what is fused, when it runs, where it lies in memory. Then, for minutes, it makes instructions of
each fusion, and says how many cycles they take. A sketch is the program between the two.
"""

import dataclasses
import functools
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from lineage_jax.pods.topologies import Topology
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.program import Program

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no cloud metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip to lock either: processes may run side by side
    "TPU_MIN_LOG_LEVEL": "2",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""What must be set before jax and libtpu are loaded."""

SCRIPT = "import sys; from lineage_jax.pods import aot; aot.main(*sys.argv[1:])"
"""The process that compiles: an import, so that what it pickles has this module's name."""


T = TypeVar("T")


class DoesNotFitError(ValueError):
    """The compiler found no way to fit the step in a device's memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a step; bytes are those of one device.

    A sketch has no `code`, no cycles in its `hlo`, and fewer `temporaries`, by up to 28 %.

    Attributes:
      hlo: the optimised program, as text.
      arguments, outputs, aliased, temporaries, code: bytes; `aliased` of the outputs are written
        over arguments.
      parts: bytes of the arguments' own elements, by part of the state and of the batch; the
        compiler pads some.
      num_params: parameters of the model, all devices together.
      coords: where each device of the mesh stands on the torus, in the mesh's order.
      axes: the mesh's axes and their extents, outermost first.
      tokens_per_step, flops_per_token: the program's.
      compile_seconds: what tracing and compiling took here.
      sketched: whether this is one.
    """

    hlo: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    parts: Mapping[str, int]
    num_params: int
    coords: tuple[tuple[int, ...], ...]
    axes: Mapping[str, int]
    tokens_per_step: int
    flops_per_token: int
    compile_seconds: float
    sketched: bool = False

    @property
    def hbm(self) -> int:
        """All that is in memory at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
      program: makes the program; it is pickled, so a module's function or a method of a config.
      topology: for what.
      mesh: over which axes.
      accumulate: in how many micro-batches.
    """

    program: Callable[[], Program]
    topology: Topology
    mesh: MeshConfig
    accumulate: int = 1


def compile_step(request: Request) -> Compiled:
    """Compiles the step that `train` runs, in a new process.

    Raises:
      ImportError: if libtpu is not installed.
      DoesNotFitError: if the step does not fit in memory.
      ValueError: if the mesh does not fit the slice or the program, or libtpu has no such slice.
      RuntimeError: if the compiler fails otherwise.
    """
    return in_a_process(request.topology.chip.flags, functools.partial(compile_here, request))


def sketch_step(request: Request) -> Compiled:
    """Optimises the step that `train` runs, in a new process, and makes no code of it.

    Raises:
      ImportError, ValueError, RuntimeError: as `compile_step`.
    """
    with tempfile.TemporaryDirectory(prefix="lineage-sketch-") as folder:
        work = functools.partial(sketch_here, request, pathlib.Path(folder))
        flags = request.topology.chip.flags
        return in_a_process(flags, work, XLA_FLAGS=f"--xla_dump_to={folder}")


def in_a_process(flags: Sequence[str], work: Callable[[], T], **environment: str) -> T:
    """The result of some work, done by a process whose libtpu has these flags."""
    with tempfile.TemporaryDirectory(prefix="lineage-plan-") as folder:
        asked, answered = pathlib.Path(folder, "request"), pathlib.Path(folder, "answer")
        asked.write_bytes(pickle.dumps(work))
        kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(asked), str(answered)],
            env={
                **kept,  # without those of another platform's devices
                **ENVIRONMENT,
                "LIBTPU_INIT_ARGS": " ".join([*flags, kept.get("LIBTPU_INIT_ARGS", "")]).strip(),
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                **environment,
            },
            capture_output=True,
            text=True,
        )
        if not answered.exists():
            said = process.stderr.strip().splitlines() or ["nothing was said"]
            raise RuntimeError(f"the TPU compiler ended with code {process.returncode}: {said[-1]}")
        answer = pickle.loads(answered.read_bytes())
    if isinstance(answer, Exception):
        raise answer
    return answer


def compile_here(request: Request) -> Compiled:
    """`compile_step` in this process, whose environment must be that of `in_a_process`."""
    mesh, program = request.topology.mesh(request.mesh), request.program()
    described = describe(program, mesh)
    start = time.perf_counter()
    compiled = program.compile_for(mesh, accumulate=request.accumulate)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Compiled(
        hlo=compiled.as_text(),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        compile_seconds=seconds,
        **described,
    )


def sketch_here(request: Request, folder: pathlib.Path) -> Compiled:
    """`sketch_step` in this process, which must end after it: the compiler still goes on.

    Args:
      request: what to compile.
      folder: where XLA writes what it makes of a program (--xla_dump_to).
    """
    mesh, program = request.topology.mesh(request.mesh), request.program()
    described = describe(program, mesh)
    arguments = sum(described["parts"].values())
    start, failed = time.perf_counter(), list[Exception]()

    def work() -> None:
        try:
            program.compile_for(mesh, accumulate=request.accumulate)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while True:
        ended = not thread.is_alive()
        if found := dumped(folder):
            break
        if failed:
            raise failed[0]
        if ended:
            raise RuntimeError("this libtpu writes no optimised program where XLA_FLAGS says")
        time.sleep(0.1)
    hlo, total = found
    return Compiled(
        hlo=hlo,
        arguments=arguments,
        outputs=0,
        aliased=0,
        temporaries=total - arguments,
        code=0,
        compile_seconds=time.perf_counter() - start,
        sketched=True,
        **described,
    )


def dumped(folder: pathlib.Path) -> tuple[str, int] | None:
    """The optimised program in a folder of XLA's dumps and its bytes of memory, if it is whole."""
    for path in folder.glob("*.after_optimizations_after_buffer_assignment.txt"):
        hlo = path.read_text()
        if "\nENTRY " not in hlo or not hlo.rstrip("\n").endswith("\n}"):
            continue
        (report,) = folder.glob("*.after_optimizations-memory-usage-report.txt")
        if size := re.search(r"Total bytes: (\d+)", report.read_text()):
            return hlo, int(size[1])
    return None


def describe(program: Program, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What is known of a step before it is compiled: those fields of `Compiled`."""
    state, batches = program.abstract_state(mesh), program.abstract_batches(mesh, 1)
    return dict(
        parts={
            "parameters": device_bytes(state.params),
            "optimiser": device_bytes(state.opt_state),
            "other state": device_bytes((state.step, state.seed, state.extra, state.skipped)),
            "batch": device_bytes(batches),
        },
        num_params=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        coords=tuple(tuple(device.coords) for device in mesh.devices.flat),
        axes=dict(mesh.shape),
        tokens_per_step=program.tokens_per_step,
        flops_per_token=program.flops_per_token,
    )


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def does_not_fit(message: str) -> DoesNotFitError:
    """The compiler's error, in one line, with what to change."""
    needs = "more than it has"
    if part := re.search(r"for (?:HLO )?(\w+) \((\S+)\) exceeds available HBM \((\S+)\)", message):
        needs = f"{part[2]}iB for {part[1]}, has {part[3]}iB"
    elif total := re.search(r"Used (\S+) of (\S+) hbm", message):
        needs = f"{total[1]}iB for all, has {total[2]}iB"
    return DoesNotFitError(
        f"does not fit: a device needs {needs}; split it further (--mesh.fsdp, --mesh.tensor), "
        "recompute more (--model.remat full), or take fewer rows (--data.batch-size)"
    )


def main(asked: str, answered: str) -> None:
    """Does pickled work, leaves its pickled result or exception, and ends the process."""
    answer: Any
    try:
        answer = pickle.loads(pathlib.Path(asked).read_bytes())()
    except (ValueError, ImportError) as error:
        answer = error
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if message.startswith("RESOURCE_EXHAUSTED"):
            answer = does_not_fit(message)
        else:
            answer = RuntimeError(message)
    pathlib.Path(answered).write_bytes(pickle.dumps(answer))
    os._exit(0)  # whatever the compiler is doing still
