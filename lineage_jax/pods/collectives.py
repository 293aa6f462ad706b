"""The collectives of a compiled program: what is exchanged, and along which axes of the mesh."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from lineage_jax.pods.hlo import Computation, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `KINDS`.
      payload: bytes that each device brings.
      groups: devices that exchange with each other, by their index in the mesh; of a permutation,
        pairs of source and target.
    """

    kind: str
    payload: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def wire(self) -> int:
        """Bytes that a device sends: the least that the exchange needs, as on a ring."""
        n = len(self.groups[0])
        return {
            "all-gather": self.payload * (n - 1),
            "all-reduce": 2 * self.payload * (n - 1) // n,
            "reduce-scatter": self.payload * (n - 1) // n,
            "all-to-all": self.payload * (n - 1) // n,
            "collective-permute": self.payload,
        }[self.kind]

    def axes(self, mesh: Mapping[str, int]) -> str:
        """The axes of the mesh along which its groups lie."""
        names = [name for name, size in mesh.items() if size > 1]
        places = np.array(np.unravel_index(np.array(self.groups), tuple(mesh.values())))  # axis G n
        differ = (places != places[:, :, :1]).any((1, 2))
        along = [name for name, here in zip(mesh, differ, strict=True) if here]
        return " x ".join(name for name in names if name in along) or "none"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The part that an instruction has in a collective.

    Attributes:
      collective: what is exchanged; None where a `key` says it.
      role: "whole" for all of it; "start" and "done" of an asynchronous one; "step" for a
        computation that moves it along.
      key: the same for the start, the steps and the end of one collective.
    """

    collective: Collective | None
    role: str
    key: str


def exchanges(module: Module, computation: Computation, one: Instruction) -> list[Exchange]:
    """What an instruction has to do with collectives.

    Asynchronous collectives are written in three ways: "all-gather-start" and "all-gather-done";
    "async-start" (or "call-start") and "async-done", which call a computation, on another core
    maybe; and fusions that a TPU moves along inside of matrix products, whose parts share a
    channel.
    """
    name, _, part = one.opcode.rpartition("-")
    if one.opcode in KINDS:
        return [Exchange(read(module, computation, one), "whole", one.name)]
    if part == "start" and name in KINDS:
        return [Exchange(read(module, computation, one, name), "start", one.name)]
    if part == "done":  # of whatever began
        return [Exchange(None, "done", one.operands[0])]
    if one.opcode != "fusion" and part != "start":
        return []
    inside = [*module.inside(one)]
    found = {channel(inner): (where, inner) for where, inner in inside if inner.opcode in KINDS}
    if not found:
        return []
    if part == "start":
        ((where, inner),) = found.values()
        return [Exchange(read(module, where, inner), "start", one.name)]
    targets = " ".join(inner.attributes for _, inner in inside if inner.opcode == "custom-call")
    if "AsyncCollectiveStart" in targets:
        role = "start"
    elif "AsyncCollectiveDone" in targets:
        role = "done"
    else:
        role = "step" if "continuation_config" in one.attributes else "whole"
    made = []
    for key, (where, inner) in found.items():
        scatters = inner.opcode == "all-reduce" and where.name.startswith("all-reduce-scatter")
        kind = "reduce-scatter" if scatters else inner.opcode
        made.append(Exchange(read(module, where, inner, kind), role, key))
    return made


def channel(one: Instruction) -> str:
    """What the parts of a collective share."""
    found = re.search(r"channel_id=\d+", one.attributes)
    return found[0] if found else one.name


def read(
    module: Module, computation: Computation, one: Instruction, kind: str | None = None
) -> Collective:
    """The collective of an instruction."""
    payload = sum(operand.bytes for operand in computation.operands(one))
    return Collective(kind or one.opcode, payload, groups(one.attributes, module.num_partitions))


def groups(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective, in each of the three ways that HLO writes them.

    As a list, {{0,1},{2,3}}; as a range, reshaped and transposed, [2,2]<=[2,2]T(1,0); or by the
    axes of a mesh, mesh['a'=2,'b'=2] {'b'}, whose devices may be such a range too.

    Raises:
      ValueError: if they are written in another way.
    """
    listed = re.search(
        r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes
    )
    if listed:
        found = re.findall(r"\{([\d,]*)\}", listed[1])
        rows = tuple(tuple(numbers(row)) for row in found if row)
        return rows or (tuple(range(num_devices)),)
    ranged = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if ranged:
        devices = order(ranged[2], ranged[3]).reshape(numbers(ranged[1]))
        return tuple(tuple(row) for row in devices.tolist())
    meshed = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{([^}]*)\}",
        attributes,
    )
    if meshed is None:
        raise ValueError(f"cannot read the groups of a collective in {attributes[:120]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", meshed[1])}
    # An axis may be named in part: 'a':(2)4 is the 4 inside of the outermost 2.
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", meshed[4])
    dims: list[int] = []
    along: list[int] = []
    for name, size in sizes.items():
        mine = [
            (int(before or 1), int(some or size)) for axis, before, some in parts if axis == name
        ]
        left = 1
        for before, some in sorted(mine):
            dims += [before // left, some]
            along.append(len(dims) - 1)
            left = before * some
        dims.append(size // left)
    ids = order(meshed[2], meshed[3]) if meshed[2] else np.arange(math.prod(sizes.values()))
    across = [dim for dim in range(len(dims)) if dim not in along]
    width = math.prod(dims[dim] for dim in along)
    devices = ids.reshape(dims).transpose(across + along).reshape(-1, width)
    return tuple(tuple(row) for row in devices.tolist())


def numbers(text: str | None) -> list[int]:
    """Of "1,2,3"."""
    return [int(part) for part in (text or "").split(",") if part]


def order(dims: str, transposed: str | None) -> np.ndarray:
    """A range of devices, [dims]T(transposed)."""
    shape = numbers(dims)
    return np.arange(math.prod(shape)).reshape(shape).transpose(numbers(transposed) or None).ravel()
