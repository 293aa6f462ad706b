"""How long a compiled step takes: a walk through its schedule with two clocks.

One is the device's: an instruction takes the cycles that the compiler estimates, a loop as often
as it goes round. The other is the links': collectives pass one after the other, in the order in
which they begin. A synchronous one holds the device until it is through; for an asynchronous one
the device waits where it ends, if it is not through by then.
"""

import dataclasses
from collections.abc import Mapping

from lineage_jax.pods.hlo import Computation, Instruction, Module
from lineage_jax.pods.network import Torus, collective

FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
    | {"partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"}
)
"""Opcodes that take no time."""

PRODUCTS = ("convolution", "dot")
"""Opcodes of matrix products; a TPU's are all convolutions."""


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
        return sum(one.seconds for one in self.traffic.values())

    def at(self, kind: str, axes: str) -> Traffic:
        """The traffic of a kind along some axes."""
        return self.traffic.setdefault((kind, axes), Traffic())

    def wait(self, end: float, traffic: Traffic) -> None:
        """Lets the device wait for a collective that is through at `end`."""
        waited = max(0.0, end - self.seconds)
        self.exposed += waited
        traffic.exposed += waited

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

    def __init__(self, module: Module, torus: Torus, mesh: Mapping[str, int]):
        """Prepares a walk.

        Args:
          module: the program of one device.
          torus: its links.
          mesh: the mesh's axes and their extents, outermost first.
        """
        self.module, self.torus, self.mesh = module, torus, mesh
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
        cost, free = Cost(), 0.0  # when the links are free again
        ends: dict[str, tuple[float, Traffic]] = {}
        for one in computation.instructions.values():
            exchange = collective(self.module, computation, one)
            if exchange is not None:
                seconds = self.torus.seconds(exchange)
                free = max(free, cost.seconds) + seconds
                traffic = cost.at(exchange.kind, exchange.axes(self.mesh))
                traffic.count += 1
                traffic.bytes += exchange.wire
                traffic.seconds += seconds
                if one.opcode.endswith("-start"):
                    traffic.asynchronous += 1
                    ends[one.name] = free, traffic
                else:
                    cost.wait(free, traffic)
            elif one.opcode.endswith("-done") and one.operands[0] in ends:
                cost.wait(*ends.pop(one.operands[0]))
            elif one.opcode == "while":
                trips = self.module.trips(one)
                if trips is None:
                    cost.miss("loop whose number of rounds is not to be read, counted once")
                cost.add(self.of(self.module.called(one, "body")), 1 if trips is None else trips)
            elif one.opcode == "conditional":
                branches = [self.of(self.module.computations[name]) for name in one.branches]
                cost.add(max(branches, key=lambda branch: branch.seconds))
            elif one.opcode == "call":
                cost.add(self.of(self.module.called(one, "to_apply")))
            elif one.opcode not in FREE:
                self._compute(cost, computation, one)
        return cost

    def _compute(self, cost: Cost, computation: Computation, one: Instruction) -> None:
        """Adds what an instruction keeps the device busy for."""
        chip = self.torus.topology.chip
        if one.cycles is not None:
            seconds = one.cycles / chip.clock
        else:
            moved = one.bytes + sum(operand.bytes for operand in computation.operands(one))
            seconds = moved / (chip.hbm_bandwidth / chip.devices)
        if one.opcode in PRODUCTS or any(i.opcode in PRODUCTS for _, i in self.module.inside(one)):
            cost.compute += seconds
        else:
            cost.memory += seconds
