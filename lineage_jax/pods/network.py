"""How long the torus of a slice takes to carry a collective.

A ring algorithm runs on every dimension of the torus that a group spans, at once (Austin et al.
2025, "How to Scale Your Model", part 3, https://jax-ml.github.io/scaling-book/sharding).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lineage_jax.pods.collectives import Collective
from lineage_jax.pods.topologies import Topology

HOP_SECONDS = 1e-6
"""Until the first byte has passed one link (Austin et al. 2025, part 3)."""


@dataclasses.dataclass(frozen=True)
class Torus:
    """The links of a slice, and where the devices of a mesh stand on it.

    Attributes:
      topology: the slice.
      coords: of each device of the mesh, in the mesh's order.
    """

    topology: Topology
    coords: tuple[tuple[int, ...], ...]

    @property
    def link(self) -> float:
        """Bytes per second, one way: each device's share of one of its chip's links."""
        return self.topology.chip.link_bandwidth / self.topology.chip.devices

    def seconds(self, exchange: Collective) -> float:
        """How long the exchange takes with the links to itself, all its groups at once."""
        if len(exchange.groups[0]) == 1 or exchange.payload == 0:
            return 0.0
        if exchange.kind == "collective-permute":
            return self._permute(exchange)
        spans = self._spans(exchange.groups[0])
        if not spans:  # the cores of one chip
            return 0.0
        latency = sum(span.hops for span in spans) * HOP_SECONDS
        if exchange.kind == "all-to-all":
            bytes_ = max(
                exchange.payload * (span.extent**2 // 4) / span.extent / span.ports
                for span in spans
            )
        else:
            bytes_ = exchange.wire / sum(span.ports for span in spans)
        return latency + bytes_ / self.link

    def _spans(self, group: Sequence[int]) -> list["Span"]:
        """The dimensions of the torus that a group lies along."""
        places = np.array([self.coords[device] for device in group])[:, : len(self.topology.shape)]
        spans = []
        for dim, size in enumerate(self.topology.shape):
            found = np.unique(places[:, dim])
            if len(found) > 1:
                stride = int(np.diff(found).min())
                ring = self.topology.wraps[dim] and len(found) * stride == size
                spans.append(Span(len(found), stride, ring))
        if math.prod(span.extent for span in spans) != len(np.unique(places, axis=0)):
            spans = [max(spans, key=lambda span: span.extent)]  # no box: one ring or line
        return spans

    def _permute(self, exchange: Collective) -> float:
        """By the busiest link, when each pair goes the short way, dimension after dimension."""
        load: Counter[tuple[tuple[int, ...], int, int]] = Counter()
        most = 0
        for source, target in exchange.groups:
            here, there = list(self.coords[source]), self.coords[target]
            hops = 0
            for dim, size in enumerate(self.topology.shape):
                ahead = there[dim] - here[dim]
                if self.topology.wraps[dim] and abs(ahead) > size // 2:
                    ahead -= int(math.copysign(size, ahead))
                way = 1 if ahead > 0 else -1
                for _ in range(abs(ahead)):
                    load[(*here,), dim, way] += 1
                    here[dim] = (here[dim] + way) % size
                    hops += 1
            most = max(most, hops)
        busiest = max(load.values(), default=0)
        return most * HOP_SECONDS + busiest * exchange.payload / self.link


@dataclasses.dataclass(frozen=True)
class Span:
    """How a group lies along one dimension of the torus.

    Attributes:
      extent: places along it.
      stride: between two neighbours of the group; groups that lie between share their links.
      ring: whether the links close to a ring.
    """

    extent: int
    stride: int
    ring: bool

    @property
    def ports(self) -> float:
        """Links that bring a device bytes at once: two on a ring, one at the end of a line."""
        return (2 if self.ring else 1) / self.stride

    @property
    def crossings(self) -> float:
        """Links that a byte of an all-to-all passes on the way, on average."""
        return (self.extent**2 // 4) / self.extent

    @property
    def hops(self) -> int:
        """From one to the one that is farthest."""
        return self.stride * (self.extent // 2 if self.ring else self.extent - 1)
