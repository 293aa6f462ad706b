"""The cost of small programs that the TPU compiler compiled (`hlo/make.py`), counted by hand."""

import json
import pathlib

import pytest

from lineage_jax.pods import CHIPS, hlo
from lineage_jax.pods.cost import Cost, Walk
from lineage_jax.pods.network import Torus
from lineage_jax.pods.topologies import Topology

FOLDER = pathlib.Path(__file__).parent / "hlo"
LOCAL = 128 * 512 * 4
"""Bytes of the array [128, 512] in float32 that each device brings to a collective."""

# The compiler's estimates imply 92 to 97 % of the peak for these products, and cannot pass it.
NEAR_THE_PEAK = (1.0, 1.1)


def cost(name: str, sketched: bool = False) -> Cost:
    """Of a program; a sketch has no cycles."""
    head, _, text = (FOLDER / f"{name}.hlo").read_text().partition("\n")
    if sketched:
        assert "estimated_cycles" in text
        text = text.replace("estimated_cycles", "no_cycles")
    given = json.loads(head.removeprefix("// "))
    coords = tuple(tuple(place) for place in given["coords"])
    torus = Torus(Topology.parse(given["topology"]), coords)
    return Walk(hlo.parse(text), torus, given["axes"], sketched).cost()


def test_a_matrix_product_takes_its_flops_over_the_peak():
    found = cost("matmul")
    ideal = 2 * 4096**3 / 197e12
    low, high = NEAR_THE_PEAK
    assert low <= found.compute / ideal <= high
    assert found.exposed == found.network == 0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_each_chip_comes_to_a_part_of_its_peak_on_a_large_product(chip):
    name = f"product_{chip.name}"
    found = cost(name)
    # The compiler's estimates, at the clocks of `chips.py`: a record, to two digits, of how far
    # below the peak every plan for that chip begins.
    ideal = 2 * 8192**3 / (chip.peak_flops / chip.devices)
    assert ideal / found.compute == pytest.approx(chip.products, abs=0.005)
    sketched = cost(name, sketched=True).compute
    assert sketched == pytest.approx(ideal / chip.products, rel=1e-12)


def test_a_scan_takes_its_body_as_often_as_it_goes_round():
    found = cost("scan")
    assert found.compute == pytest.approx(12 * 141_966 / 1.5e9, rel=1e-12)  # as the file says
    low, high = NEAR_THE_PEAK
    assert low <= found.compute / (12 * 2 * 2048**3 / 197e12) <= high
    assert not found.unread


def test_a_pallas_kernel_takes_the_bytes_that_it_states_over_the_bandwidth():
    found = cost("kernel")
    assert found.memory == pytest.approx(2**22 / 819e9, rel=1e-12)
    assert not found.unread


KERNEL = """HloModule one, is_scheduled=true

ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %flash_attention_forward.3 = bf16[8,128]{1,0} custom-call(%p), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"masked":"0.250000"
}}, backend_config={"cost_estimate":{"flops":"197000000000","bytes_accessed":"4096"}}
}
"""


@pytest.mark.parametrize("stated", [True, False])
def test_a_kernel_whose_shares_of_the_peak_are_known_takes_so_much_longer(stated):
    torus = Torus(Topology.parse("v5e:2x2"), ((0, 0, 0),))
    text = KERNEL if stated else KERNEL.replace("masked", "no such thing")
    found = Walk(hlo.parse(text), torus, {"data": 1}).cost()
    masked, whole = dict(torus.topology.chip.kernels)["flash_attention_forward"]
    expected = 0.25 / masked + 0.75 / whole if stated else 1 / masked
    assert found.compute == pytest.approx(1e-3 * expected, rel=1e-12)  # 197e9 FLOPs at 197e12


@pytest.mark.parametrize("chip", ["v5e", "v5p"])
@pytest.mark.parametrize(
    ("axes", "size"), [("fsdp", 4), ("tensor", 2), ("fsdp_tensor", 8)], ids=lambda value: str(value)
)
@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("all_gather", "all-gather"),
        ("all_reduce", "all-reduce"),
        ("reduce_scatter", "reduce-scatter"),
        ("all_to_all", "all-to-all"),
    ],
)
def test_a_collective_sends_its_bytes_along_its_axes(program, kind, axes, size, chip):
    if (program, axes, chip) == ("reduce_scatter", "fsdp_tensor", "v5p"):
        kind = "all-reduce"  # so it is compiled there: with a slice after it, at twice the bytes
    found = cost(f"{program}_{axes}_{chip}")
    sent = {
        "all-gather": LOCAL * (size - 1),
        "all-reduce": 2 * LOCAL * (size - 1) // size,
        "reduce-scatter": LOCAL * (size - 1) // size,
        "all-to-all": LOCAL * (size - 1) // size,
    }[kind]
    ((key, traffic),) = found.traffic.items()
    assert key == (kind, axes.replace("_", " x "))
    assert (traffic.count, traffic.bytes) == (1, sent)
    assert traffic.asynchronous == 0
    assert traffic.seconds > 0
    assert found.exposed == traffic.exposed == pytest.approx(traffic.seconds, rel=1e-12)


@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_a_permutation_is_asynchronous_and_its_neighbour_waits_for_the_end(chip):
    found = cost(f"permute_fsdp_{chip}")
    ((key, traffic),) = found.traffic.items()
    assert key == ("collective-permute", "fsdp")
    assert (traffic.count, traffic.asynchronous, traffic.bytes) == (1, 1, LOCAL)
    assert traffic.exposed == pytest.approx(traffic.seconds, rel=1e-12)  # nothing to hide it behind


def test_an_all_gather_takes_its_bytes_over_the_links_of_its_group():
    found = cost("all_gather_tensor_v5e")  # two neighbours and one link
    assert found.network == pytest.approx(1e-6 + LOCAL / 45e9, rel=1e-12)


HIDDEN = """\
HloModule jit_step, is_scheduled=true, num_partitions=2

%begin (b: f32[128,512]) -> (f32[128,512], f32[256,512]) {
  %b = f32[128,512]{1,0} parameter(0)
  %gather.1 = f32[256,512]{1,0} all-gather(%b), channel_id=7, replica_groups={{0,1}}
  ROOT %start.1 = (f32[128,512]{1,0}, f32[256,512]{1,0}) custom-call(%gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%along (a: f32[128,512]) -> f32[128,512] {
  %a = f32[128,512]{1,0} parameter(0)
  ROOT %gather.2 = f32[256,512]{1,0} all-gather(%a), channel_id=7, replica_groups={{0,1}}
}

%finish (d: f32[128,512]) -> f32[256,512] {
  %d = f32[128,512]{1,0} parameter(0)
  %gather.3 = f32[256,512]{1,0} all-gather(%d), channel_id=7, replica_groups={{0,1}}
  ROOT %end.1 = f32[256,512]{1,0} custom-call(%gather.3), \
custom_call_target="AsyncCollectiveDone"
}

%called (c: f32[128,512]) -> f32[256,512] {
  %c = f32[128,512]{1,0} parameter(0)
  ROOT %gather.4 = f32[256,512]{1,0} all-gather(%c), channel_id=7, replica_groups={{0,1}}
}, execution_thread="sparsecore"

%thread (e: f32[128,512]) -> f32[256,512] {
  %e = f32[128,512]{1,0} parameter(0)
  ROOT %call.1 = f32[256,512]{1,0} call(%e), to_apply=%called
}, execution_thread="sparsecore"

ENTRY %main (x: f32[128,512]) -> f32[256,512] {
  %x = f32[128,512]{1,0} parameter(0)
  BODY
}
"""
APART = """%start = (f32[128,512]{1,0}, f32[256,512]{1,0}) all-gather-start(%x), channel_id=7, \
replica_groups={{0,1}}
  %work = f32[128,512]{1,0} negate(%x), backend_config={"estimated_cycles":"CYCLES"}
  ROOT %done = f32[256,512]{1,0} all-gather-done(%start)"""
FUSED = """%start = (f32[128,512]{1,0}, f32[256,512]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %part = f32[128,512]{1,0} get-tuple-element(%start), index=0
  %idle = f32[128,512]{1,0} negate(%x), backend_config={"estimated_cycles":"IDLE"}
  %work = f32[128,512]{1,0} fusion(%part), kind=kOutput, calls=%along, \
backend_config={"continuation_config":{},"estimated_cycles":"CYCLES"}
  ROOT %done = f32[256,512]{1,0} fusion(%work), kind=kCustom, calls=%finish"""
ELSEWHERE = """%start = ((f32[128,512]{1,0}), f32[256,512]{1,0}) async-start(%x), \
async_execution_thread="sparsecore", calls=%thread
  %work = f32[128,512]{1,0} negate(%x), backend_config={"estimated_cycles":"CYCLES"}
  ROOT %done = f32[256,512]{1,0} async-done(%start)"""
CALLED = ELSEWHERE.replace("async-start", "call-start").replace("async-done", "call-done")
GATHER = 1e-6 + LOCAL / 45e9
"""Seconds on the one link between two neighbours."""


def hidden(body: str, **cycles: int) -> Cost:
    text = HIDDEN.replace("BODY", body)
    for name, count in cycles.items():
        text = text.replace(name, str(count))
    torus = Torus(Topology.parse("v5e:1x2"), ((0, 0, 0), (0, 1, 0)))
    return Walk(hlo.parse(text), torus, {"fsdp": 2}).cost()


@pytest.mark.parametrize(
    ("body", "cycles"), [(APART, {}), (FUSED, {"IDLE": 0}), (ELSEWHERE, {}), (CALLED, {})]
)
def test_an_asynchronous_collective_hides_behind_the_work_between_its_ends(body, cycles):
    short = hidden(body, CYCLES=3000, **cycles)  # 2 us, not enough
    assert short.exposed == pytest.approx(GATHER - 2e-6, rel=1e-9)
    long = hidden(body, CYCLES=30_000, **cycles)
    assert long.exposed == 0
    ((key, traffic),) = long.traffic.items()
    assert key == ("all-gather", "fsdp")
    assert (traffic.count, traffic.asynchronous, traffic.bytes) == (1, 1, LOCAL)
    assert traffic.seconds == pytest.approx(GATHER, rel=1e-12)


def test_a_collective_inside_of_products_does_not_pass_beside_other_work():
    assert hidden(FUSED, CYCLES=0, IDLE=30_000).exposed == pytest.approx(GATHER, rel=1e-9)
