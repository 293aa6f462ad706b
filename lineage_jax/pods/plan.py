"""What a training step would be on a slice: what fits, how fast, for how many days and dollars."""

import dataclasses
import json
from collections.abc import Iterator, Mapping

from lineage_jax.pods import hlo
from lineage_jax.pods.aot import Compiled, Request, compile_step, sketch_step
from lineage_jax.pods.cost import Cost, Walk
from lineage_jax.pods.memory import activations
from lineage_jax.pods.network import HOP_SECONDS, Torus
from lineage_jax.pods.topologies import Topology

UNSEEN = (
    "the host: reading data, saving checkpoints, the time between two steps",
    "stragglers, preemption, restarts",
    "traffic between slices, over the data-centre network",
    "what happens inside Pallas kernels, but for the counts that they state and the share of the "
    "peak that those of attention reach with heads of 128",
)
"""What no compiler can tell."""

ACTIVATIONS, TEMPORARIES = "activations", "temporaries"
"""The parts of a plan's memory that grow with the rows of a batch: what layers leave for the
backward pass, and all else that is neither state nor data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Collectives of one kind along the same axes, over one step.

    Attributes:
      kind: as HLO calls it.
      axes: of the mesh.
      count: how many, `asynchronous` of them beside the computation.
      bytes: that a device sends.
      seconds: on the links; `exposed` of them the device waits.
    """

    kind: str
    axes: str
    count: int
    asynchronous: int
    bytes: int
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One step on one slice, predicted; bytes and seconds are those of one device.

    Attributes:
      topology, chips, mesh: the slice, and its axes that are not 1.
      params: of the model.
      tokens_per_step: of the global batch.
      hbm: bytes by part; `hbm_limit` is what a device has.
      compute, memory, exposed: seconds of a step in matrix products, in everything else on the
        device, and waiting for the links; `network` is what passes the links, waited for or not.
      traffic: collectives.
      mfu: model FLOPs (none recomputed) over the peak.
      tokens: the budget; `days` and `cost` (US dollars, None without a price) are for it.
      compile_seconds: on the machine that planned.
      assumptions: behind these numbers, in words.
    """

    topology: str
    chips: int
    mesh: Mapping[str, int]
    params: int
    tokens_per_step: int
    hbm: Mapping[str, int]
    hbm_limit: int
    compute: float
    memory: float
    exposed: float
    network: float
    traffic: tuple[Row, ...]
    tokens_per_second_per_chip: float
    mfu: float
    tokens: float
    days: float
    cost: float | None
    compile_seconds: float
    assumptions: tuple[str, ...]
    unseen: tuple[str, ...] = UNSEEN

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.memory + self.exposed

    @property
    def hbm_total(self) -> int:
        return sum(self.hbm.values())

    @property
    def fits(self) -> bool:
        return self.hbm_total <= self.hbm_limit

    @property
    def bound(self) -> str:
        """What most of the step is spent on."""
        terms = {"compute": self.compute, "memory": self.memory, "network": self.exposed}
        return max(terms, key=lambda name: terms[name])

    def to_json(self) -> str:
        """All of it, with what follows from it."""
        names = ("seconds", "bound", "hbm_total", "fits")
        derived = {name: getattr(self, name) for name in names}
        return json.dumps({**dataclasses.asdict(self), **derived}, indent=2) + "\n"

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items()) or "one device"
        yield f"{self.topology}: {self.chips} chips, mesh {mesh}; {self.params:,} parameters"
        yield f"compiled in {self.compile_seconds:.0f} s for {self.tokens_per_step:,} tokens a step"
        yield ""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        yield (
            f"memory of a device: {amount(self.hbm_total)} of {amount(self.hbm_limit)}: {verdict}"
        )
        for part, size in self.hbm.items():
            yield f"  {part:<28}{amount(size):>13}"
        yield ""
        yield f"step: {duration(self.seconds)}, bound by {self.bound}"
        yield f"  compute (matrix products)   {duration(self.compute):>14}"
        yield f"  memory (everything else)    {duration(self.memory):>14}"
        yield f"  waiting for the network     {duration(self.exposed):>14}"
        yield f"  (on the links, hidden too)  {duration(self.network):>14}"
        yield ""
        if self.traffic:
            names = f"{'count':>7}{'async':>7}{'MB sent':>12}{'links':>13}{'waited':>13}"
            yield f"  {'collective':<20}{'axes':<18}{names}"
        for row in self.traffic:
            yield (
                f"  {row.kind:<20}{row.axes:<18}{row.count:>7}{row.asynchronous:>7}"
                f"{row.bytes / 1e6:>12.2f}{duration(row.seconds):>13}{duration(row.exposed):>13}"
            )
        yield ""
        yield f"{self.tokens_per_second_per_chip:,.0f} tokens/s per chip, MFU {self.mfu:.1%}"
        cost = "no price known" if self.cost is None else f"{self.cost:,.0f} USD"
        yield f"{self.tokens:.3g} tokens: {self.days:,.2f} days, {cost}"
        yield ""
        yield "assumed:"
        yield from (f"  - {line}" for line in self.assumptions)
        yield "not seen:"
        yield from (f"  - {line}" for line in self.unseen)


def make_plan(request: Request, tokens: float) -> Plan:
    """Compiles a step for a slice and predicts it.

    Args:
      request: what to compile.
      tokens: to train on; days and cost are for them.

    Raises:
      ImportError, ValueError, RuntimeError: as `compile_step`.
    """
    return predict(compile_step(request), request.topology, tokens)


def make_sketch(request: Request, tokens: float) -> Plan:
    """A first plan, from a program without code: seconds to make, where `make_plan` takes minutes.

    A fusion then takes as long as its FLOPs at the share of the peak that a large product reaches,
    or as its bytes. Steps came out up to 15 % too fast, memory up to 28 % too little, and the wait
    for the links as in the plan (`experiments/LOG.md`).

    Args:
      request, tokens: as for `make_plan`.

    Raises:
      ImportError, ValueError, RuntimeError: as `compile_step`.
    """
    return predict(sketch_step(request), request.topology, tokens)


def predict(compiled: Compiled, topology: Topology, tokens: float) -> Plan:
    """The plan of a compiled step."""
    chip = topology.chip
    module = hlo.parse(compiled.hlo)
    torus = Torus(topology, compiled.coords)
    cost = Walk(module, torus, compiled.axes, compiled.sketched).cost()
    per_second = compiled.tokens_per_step / cost.seconds
    hours = tokens / per_second / 3600
    rows = [
        Row(
            kind=kind,
            axes=axes,
            count=one.count,
            asynchronous=one.asynchronous,
            bytes=one.bytes,
            seconds=one.seconds,
            exposed=one.exposed,
        )
        for (kind, axes), one in cost.traffic.items()
    ]
    return Plan(
        topology=topology.name,
        chips=topology.num_chips,
        mesh={axis: size for axis, size in compiled.axes.items() if size > 1},
        params=compiled.num_params,
        tokens_per_step=compiled.tokens_per_step,
        hbm=hbm(compiled, activations(module)),
        hbm_limit=chip.hbm_bytes // chip.devices,
        compute=cost.compute,
        memory=cost.memory,
        exposed=cost.exposed,
        network=cost.network,
        traffic=tuple(sorted(rows, key=lambda row: -row.seconds)),
        tokens_per_second_per_chip=per_second / topology.num_chips,
        mfu=per_second * compiled.flops_per_token / (topology.num_chips * chip.peak_flops),
        tokens=tokens,
        days=hours / 24,
        cost=None if chip.price is None else hours * topology.num_chips * chip.price,
        compile_seconds=compiled.compile_seconds,
        assumptions=tuple(assumptions(topology, cost)),
    )


def hbm(compiled: Compiled, saved: int) -> dict[str, int]:
    """Bytes of a device's memory, by part, of which activations take `saved`."""
    return {
        **compiled.parts,
        "padding of these": compiled.arguments - sum(compiled.parts.values()),
        ACTIVATIONS: saved,
        TEMPORARIES: compiled.temporaries - saved,
        "results not in place": compiled.outputs - compiled.aliased,
        "code": compiled.code,
    }


def assumptions(topology: Topology, cost: Cost) -> Iterator[str]:
    """What the prediction rests on."""
    chip = topology.chip
    rings = [str(n) for n, ring in zip(topology.shape, topology.wraps, strict=True) if ring]
    yield (
        f"computation by the compiler's own estimate of cycles, at {chip.clock / 1e9:g} GHz; loops "
        "as often as they go round"
    )
    yield (
        f"links of {chip.link_bandwidth / 1e9:g} GB/s one way; dimensions that close to a ring: "
        f"{', '.join(rings) or 'none'}; {HOP_SECONDS * 1e6:g} us a hop; ring algorithms on all "
        "dimensions of a group at once; one collective on the links at a time"
    )
    yield (
        "synchronous collectives hold the device; asynchronous ones, on SparseCores too, pass "
        "beside what runs until they end, or, where they are fused into matrix products, during "
        "those alone"
    )
    for kernel, (masked, whole) in chip.kernels:
        yield (
            f"{kernel} at {masked:.0%} of the peak in blocks of scores of which some are masked, "
            f"at {whole:.0%} in others, rows taken for one document each"
        )
    yield f"flags: {' '.join(chip.flags)}"
    if chip.price is not None:
        yield f"{chip.price:.2f} USD a chip hour, on demand, all chips at work all the time"
    for why, count in cost.unread.items():
        yield f"counted short: {count} x {why}"


def duration(seconds: float) -> str:
    """With a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3f} {unit}"
    return f"{seconds / 1e-6:.1f} us"


def amount(size: int) -> str:
    """Bytes, with a unit that suits them."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size / 2**10:.1f} KiB"
