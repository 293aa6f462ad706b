"""What a run writes down: metrics as JSON lines, its status, its surroundings, its speed."""

import dataclasses
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from etils import epath

PEAK_FLOPS: Mapping[str, float] = {
    # Dense bfloat16 FLOPs per second per chip, from the makers' specification pages.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Device kind (the longest name that it starts with counts) -> peak rate."""


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """The rate that MFU is a fraction of, in FLOPs per second per device, and where it comes from.

    A device without an entry in the table (a CPU, say) is measured: a 1024-wide float32 matrix
    product, the best of five.
    """
    known = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    if known:
        return PEAK_FLOPS[max(known, key=len)], "specification, bfloat16"
    x = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Forced host devices share one processor.
    return 2 * 1024**3 / min(seconds) / jax.local_device_count(), "measured matmul, float32"


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on besides its config."""
    devices = jax.devices()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": [part.rsplit("/", 1)[-1] if i == 0 else part for i, part in enumerate(sys.argv)],
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def config_json(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file whole or, killed or with the disk full, not at all: the old one stays."""
    path = epath.Path(path)
    part = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        part.write_text(text)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@runtime_checkable
class Writer(Protocol):
    """Receives the scalars of one step; TensorBoard and W&B are adapters of this shape."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one line a step, the truth that every other view is made from.

    A run that resumes from step s keeps the lines up to s and writes the rest anew.

    Attributes:
      last: what the file says of that step s, in its line of training and that of evaluation.
    """

    def __init__(self, path: epath.Path, resume_step: int, *, write: bool = True):
        """Opens the file; of several processes one writes, and all read what it says."""
        lines = path.read_text().splitlines() if path.exists() and resume_step else []
        kept = [line for line in lines if _step_of(line) <= resume_step]
        text = "".join(f"{line}\n" for line in kept)
        if write:
            write_text(path, text)
        of_step = [line for line in kept if _step_of(line) == resume_step]
        self.last = {name: x for line in of_step for name, x in json.loads(line).items()}
        self._path = path if write else None
        self._lines: list[str] = []
        # Objects in a bucket do not grow: gcsfs takes "append" for "write over".
        self._whole = text if "://" in os.fspath(path) else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.append(json.dumps({"step": step, **values}))

    def flush(self) -> None:
        """Appends what came since the last flush; in a bucket, by writing all of it again."""
        text = "".join(line + "\n" for line in self._lines)
        if self._path is not None and self._whole is not None:
            self._whole += text
            write_text(self._path, self._whole)
        elif self._path is not None:
            with self._path.open("a") as file:
                file.write(text)
        self._lines = []

    def close(self) -> None:
        self.flush()


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a killed run may be cut short
        return float("inf")
