"""Memory that a compiled program wants of each device, held against what there is."""

from typing import Any

import jax

ADVICE = (
    "take a smaller --data.batch-size, more micro-batches (--train.accumulate), "
    "--model.remat full, or more devices for the parameters (--mesh.fsdp)"
)


def available(device: jax.Device) -> int | None:
    """Bytes that a program may fill on a device; None where it does not say (a CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def wanted(compiled: Any) -> int:
    """Bytes on each device: arguments, temporaries and results, where they share memory once."""
    told = compiled.memory_analysis()
    if told is None:  # the backend does not say
        return 0
    return (
        told.argument_size_in_bytes
        + told.temp_size_in_bytes
        + told.output_size_in_bytes
        - told.alias_size_in_bytes
    )


def compile_within(lowered: Any, limit: int | None) -> Any:
    """Compiles what was lowered.

    Args:
      lowered: of `jax.jit(...).lower(...)`.
      limit: bytes that each device has for it; None does not look.

    Raises:
      ValueError: if it needs more memory than the limit or, by the compiler, than the device has.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:  # compilers for TPU count for themselves
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = str(error).splitlines()[0]
        raise ValueError(f"a training step does not fit in memory: {told}; {ADVICE}") from error
    if limit is not None and wanted(compiled) > limit:
        raise ValueError(
            f"a training step needs {_gigabytes(wanted(compiled))} of memory on each device, which "
            f"has {_gigabytes(limit)}; {ADVICE}"
        )
    return compiled


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
