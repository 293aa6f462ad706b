"""How long a compiled step takes: a walk through its schedule with two clocks.

One is the device's: an instruction takes the cycles that the compiler estimates, a loop as often
as it goes round. The other is the links': collectives pass one after the other, in the order in
which they begin. A synchronous one holds the device until it is through; for an asynchronous one
the device waits where it ends, if it is not through by then. One that the compiler moves along
inside of matrix products passes during those, and no others. Copies between the memories of a chip
are asynchronous too, over a third clock.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from lineage_jax.pods import roofline
from lineage_jax.pods.collectives import KINDS, Exchange, exchanges
from lineage_jax.pods.hlo import Computation, Instruction, Module
from lineage_jax.pods.network import Torus

FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
    | {"partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"}
)
"""Opcodes that take no time."""

ESTIMATED = 0.4
"""Of the memory's bandwidth: what the compiler's estimates for fusions without products come to,
0.33 to 0.43 in planned steps (`experiments/LOG.md`); for sketches, where it makes none."""

STATED = re.compile(r'"(flops|bytes_accessed)":"(\d+)"')
"""Counts that a Pallas kernel states (`pl.CostEstimate`)."""


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind along the same axes, over one step.

    Attributes:
      count: how many.
      bytes: that a device sends.
      seconds: on the links; `exposed` of them the device waits.
      asynchronous: of `count`, those that begin and end apart.
    """

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0
    exposed: float = 0.0
    asynchronous: int = 0


@dataclasses.dataclass
class Cost:
    """Where the time of one run goes, in seconds.

    Attributes:
      compute: in matrix products, and what the compiler fused with them.
      memory: in everything else the device does, as fast as its memory.
      exposed: waiting for the links.
      traffic: (kind, axes) -> what passes the links.
      unread: what was counted short, in words -> how many.
    """

    compute: float = 0.0
    memory: float = 0.0
    exposed: float = 0.0
    traffic: dict[tuple[str, str], Traffic] = dataclasses.field(default_factory=dict)
    unread: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.compute + self.memory + self.exposed

    @property
    def network(self) -> float:
        """On the links, whether the device waits or not."""
        return math.fsum(one.seconds for one in self.traffic.values())

    def at(self, kind: str, axes: str) -> Traffic:
        """The traffic of a kind along some axes."""
        return self.traffic.setdefault((kind, axes), Traffic())

    def miss(self, why: str) -> None:
        """Notes that something is counted short."""
        self.unread[why] = self.unread.get(why, 0) + 1

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds what another takes, so many times."""
        self.compute += times * other.compute
        self.memory += times * other.memory
        self.exposed += times * other.exposed
        for (kind, axes), one in other.traffic.items():
            mine = self.at(kind, axes)
            for field in dataclasses.fields(Traffic):
                value = getattr(mine, field.name) + times * getattr(one, field.name)
                setattr(mine, field.name, value)
        for why, count in other.unread.items():
            self.unread[why] = self.unread.get(why, 0) + count


class Walk:
    """Costs a module, each computation once however often it is called."""

    def __init__(
        self, module: Module, torus: Torus, mesh: Mapping[str, int], sketched: bool = False
    ):
        """Prepares a walk.

        Args:
          module: the program of one device.
          torus: its links.
          mesh: the mesh's axes and their extents, outermost first.
          sketched: whether the compiler has not estimated its fusions yet.
        """
        self.module, self.torus, self.mesh, self.sketched = module, torus, mesh, sketched
        self._known: dict[str, Cost] = {}

    def cost(self) -> Cost:
        """Of the whole module."""
        return self.of(self.module.entry)

    def of(self, computation: Computation) -> Cost:
        """Of one run of a computation."""
        if computation.name not in self._known:
            self._known[computation.name] = self._of(computation)
        return self._known[computation.name]

    def _of(self, computation: Computation) -> Cost:
        run = Run(self.torus, self.mesh)
        for one in computation.instructions.values():
            parts = exchanges(self.module, computation, one)
            for part in parts:
                run.exchange(part)
            if one.opcode == "while":
                trips = self.module.trips(one)
                if trips is None:
                    run.cost.miss("loops whose rounds are not to be read, counted once")
                body = self.of(self.module.called(one, "body"))
                run.cost.add(body, 1 if trips is None else trips)
            elif one.opcode == "conditional":
                branches = [self.of(self.module.computations[name]) for name in one.branches]
                run.cost.add(max(branches, key=lambda branch: branch.seconds))
            elif one.opcode == "call":
                run.cost.add(self.of(self.module.called(one, "to_apply")))
            elif one.opcode.endswith("-start"):
                if not parts:  # a copy or a slice: its result and what it is of, whichever is less
                    run.copy_begins(one.name, min(a.bytes for a in one.arrays[:2]) / self.bandwidth)
            elif one.opcode.endswith("-done"):
                run.copy_ends(one.operands[0])
            elif one.opcode not in FREE:
                seconds, product = self.seconds(run.cost, computation, one)
                run.compute(seconds, product, parts)
        return run.cost

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a device's memory."""
        chip = self.torus.topology.chip
        return chip.hbm_bandwidth / chip.devices

    def seconds(self, cost: Cost, computation: Computation, one: Instruction) -> tuple[float, bool]:
        """How long an instruction keeps the device busy, and whether it is a matrix product."""
        chip = self.torus.topology.chip
        inside = [one, *(inner for _, inner in self.module.inside(one))]
        opcodes, products = {inner.opcode for inner in inside}, roofline.PRODUCTS
        if one.cycles is not None:
            return one.cycles / chip.clock, bool(opcodes & products)
        peak, moved = chip.peak_flops / chip.devices, 0.0
        if "tpu_custom_call" in one.attributes:
            counts = {name: int(n) for name, n in STATED.findall(one.attributes)}
            if not counts:
                cost.miss("Pallas kernels that state no counts, at the bytes of their arrays")
            flops = counts.get("flops", 0)
            if shares := dict(chip.kernels).get(one.name.partition(".")[0]):
                peak /= sum(part / share for part, share in zip(parts(one), shares, strict=True))
            moved = counts.get("bytes_accessed", roofline.moved(self.module, computation, one))
        elif one.opcode == "custom-call" or (opcodes & set(KINDS) and not opcodes & products):
            return 0.0, False
        else:
            flops = roofline.flops(self.module, computation, one)
            peak *= chip.products
            moved = roofline.moved(self.module, computation, one)
            if self.sketched and not flops:
                moved /= ESTIMATED
        computing, moving = flops / peak, moved / self.bandwidth
        return max(computing, moving), computing > moving


def parts(kernel: Instruction) -> tuple[float, float]:
    """Of the blocks that a kernel of attention computes, those that are masked, and the others."""
    stated = re.search(r"masked\W+([\d.]+)", kernel.attributes)
    masked = float(stated[1]) if stated else 1.0
    return masked, 1 - masked


class Run:
    """One run of a computation under way: what it cost so far, and what is on its way."""

    def __init__(self, torus: Torus, mesh: Mapping[str, int]):
        self.torus, self.mesh = torus, mesh
        self.cost = Cost()
        self._links = self._copies = 0.0  # when they are free again
        self._ends: dict[str, float] = {}  # of collectives and copies
        self._left: dict[str, float] = {}  # seconds, of collectives that steps move along
        self._traffic: dict[str, Traffic] = {}

    def exchange(self, part: Exchange) -> None:
        """Begins a collective, or waits for its end."""
        if part.role == "step":
            return
        if part.role == "done":
            if part.key in self._left:
                self._wait(self.cost.seconds + max(0.0, self._left.pop(part.key)), part.key)
            elif part.key in self._traffic:
                self._wait(self._ends.pop(part.key), part.key)
            return
        assert part.collective is not None
        seconds = self.torus.seconds(part.collective)
        traffic = self.cost.at(part.collective.kind, part.collective.axes(self.mesh))
        traffic.count += 1
        traffic.bytes += part.collective.wire
        traffic.seconds += seconds
        self._traffic[part.key] = traffic
        if part.role == "start":
            traffic.asynchronous += 1
        if part.role == "start" and part.key.startswith("channel_id"):
            self._left[part.key] = seconds
            return
        self._links = max(self._links, self.cost.seconds) + seconds
        if part.role == "start":
            self._ends[part.key] = self._links
        else:
            self._wait(self._links, part.key)

    def _wait(self, end: float, key: str) -> None:
        waited = max(0.0, end - self.cost.seconds)
        self.cost.exposed += waited
        self._traffic.pop(key).exposed += waited

    def compute(self, seconds: float, product: bool, parts: list[Exchange]) -> None:
        """Keeps the device busy; steps of collectives pass meanwhile."""
        if product:
            self.cost.compute += seconds
        else:
            self.cost.memory += seconds
        for part in parts:
            if part.role == "step" and part.key in self._left:
                self._left[part.key] -= seconds

    def copy_begins(self, name: str, seconds: float) -> None:
        """Begins a copy between memories."""
        self._copies = max(self._copies, self.cost.seconds) + seconds
        self._ends[name] = self._copies

    def copy_ends(self, name: str) -> None:
        """Waits for a copy."""
        self.cost.memory += max(0.0, self._ends.pop(name, 0.0) - self.cost.seconds)
