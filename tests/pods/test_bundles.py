"""A compiler's listing of a kernel is read as its loops and branches, with their bundles."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lineage_jax.pods import bundles, regions
from lineage_jax.pods.bundles import Listing
from lineage_jax.pods.regions import Region
from lineage_jax.pods.topologies import Topology

DELAY = [""] * 4
"""What is done after a jump all the same."""

STEPS = [
    "%s1 = smov 0 ;; %s2 = inlined_call_operand.hbm\n    is told on a line of its own",
    "",
    "%v1 = vld %s1 /* Start region 9 :: Start region 11 */",  # each step
    "%4 = sbr.rel (%p1) target = $region10",
    *DELAY,
    *["%v2 = vadd %v1"] * 3,
    "%5 = sbr.rel (%p2) target = $region20 /* Start/End empty region 10 */",
    *DELAY,
    "%6 = sbr.rel (!%p3) target = $region21",  # what is computed
    *DELAY,
    *["%v3 = vadd %v2"] * 3,
    "%v4 = vadd %v3 /* Start/End empty region 21 :: Start region 22 */",  # a loop of four rounds
    "%p4 = scmp.ge.s32.totalorder %s3_s9, 4 /* loop exit test */",
    "%7 = sbr.rel (!%p4) target = $region22",
    *DELAY,
    "%v5 = vadd %v4 /* Start region 23 */",  # one of as many as the data says
    "%p5 = scmp.ge.s32.totalorder %s4, %s5",
    "%8 = sbr.rel (!%p5) target = $region23",
    *DELAY,
    "%v6 = vadd %v5 /* End region 23 */",
    "%p6 = scmp.ge.s32.totalorder %s6_s1, 18 /* loop exit test :: Start/End empty region 20 */",
    "%9 = sbr.rel (!%p6) target = $region9",
    *DELAY,
    "",
]

USE = """\
== CAPACITY:
MXU, XLU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL
    4     3     3     3     1     1
== UTILIZATION:
0 0 1 0 0 0
2 0 0 1 0 2
"""


def text(rows):
    """A listing of such bundles."""
    head = ["= control target key start", "LB: loop body", "= control target key end", ""]
    addresses = ["0" if row == 0 else f"0x{row:x}" for row in range(len(rows))]
    marks = ["LB: >" if "Start region" in told else "  : >" for told in rows]
    told = zip(addresses, marks, rows, strict=True)
    return "\n".join([*head, *(f"{at:>6} {mark} {{ {row} }}" for at, mark, row in told)])


def test_loops_and_branches_are_read_with_what_is_in_them():
    four, some = Region(7, loop=True, rounds=4), Region(7, loop=True)
    computed = Region(6, (Region(3), four, some))
    step = Region(17, (Region(3), computed), loop=True, rounds=18)
    assert regions.regions(text(STEPS)) == Region(3, (step,))


def test_how_often_a_loop_is_taken_may_stand_in_the_loop_inside():
    rows = [
        "%v1 = vadd %v0 /* Start region 1 */",
        "%v2 = vadd %v1 /* Start region 2 */",
        "%p1 = scmp.ge.s32.totalorder %s1, 2 /* loop exit test */",
        "%p2 = scmp.ge.s32.totalorder (%p1), %s2, 8 /* loop exit test */",
        *("%1 = sbr.rel (!%p1) target = $region2", *DELAY),
        *("%2 = sbr.rel (!%p2) target = $region1", *DELAY),
    ]
    inner = Region(8, loop=True, rounds=2)
    assert regions.regions(text(rows)) == Region(0, (Region(6, (inner,), loop=True, rounds=8),))


def test_what_only_one_side_of_a_condition_has_is_a_branch_of_its_own():
    rows = [
        *("%1 = sbr.rel (%p1) target = $region1", *DELAY),
        *("%2 = sbr.rel target = $region2", *DELAY, ""),
        *("%v1 = vadd %v0 /* Start region 1 */", "", ""),
        "/* Start/End empty region 2 */",
    ]
    assert regions.regions(text(rows)) == Region(6, (Region(6), Region(3)))


def test_a_branch_that_lasts_to_the_end_of_the_kernel_ends_there():
    rows = ["", *("%1 = sbr.rel (%p1) target = $region1", *DELAY), "%v1 = vadd %v0", ""]
    assert regions.regions(text(rows)) == Region(6, (Region(2),))


def test_cycles_are_bundles_times_how_often_each_part_is_taken(monkeypatch):
    listing = Listing(regions.regions(text(STEPS)), spills=0)
    around, computed = 17 + 3, 6 + 3 + 4 * 7  # a small branch counts as if it were always taken
    assert listing.parts() == [around, computed, 7]
    assert listing.cycles([16, 100]) == 3 + 18 * around + 16 * computed + 100 * 7
    monkeypatch.setattr(regions, "LEAST", 3)
    assert listing.parts() == [around, computed - 3, 3, 7]
    assert listing.cycles([16, 5, 100]) == 3 + 18 * around + 16 * 34 + 5 * 3 + 100 * 7


def test_a_count_that_does_not_fit_the_kernel_is_refused():
    listing = Listing(regions.regions(text(STEPS)), spills=0)
    with pytest.raises(ValueError, match=r"wanted counts of 2 parts, .* got 1"):
        listing.cycles([16])
    with pytest.raises(ValueError, match="wanted a grid of 16 steps, got a count of 17"):
        listing.cycles([17, 100])


def test_spills_are_those_of_both_units():
    assert bundles.spills(USE) == 3


def test_the_newest_listing_of_a_kernel_is_found_by_its_name(tmp_path):
    for name, told in (("8-other-03", ""), ("7-kernel.1-03", ""), ("9-kernel-03", text(STEPS))):
        (tmp_path / f"{name}-final_bundles.txt").write_text(told)
    (tmp_path / "9-kernel-01-final_hlo-static-per-bundle-utilization.txt").write_text(USE)
    assert bundles.listing(tmp_path, "kernel") == Listing(regions.regions(text(STEPS)), 3)
    with pytest.raises(RuntimeError, match="listed no kernel called 'kern'"):
        bundles.listing(tmp_path, "kern")


def doubled(x, *, rows):
    """A kernel of one loop, in a program with more."""
    from jax.experimental import pallas as pl

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    block = pl.BlockSpec((rows, 128), lambda i: (i, 0))
    double = pl.pallas_call(
        kernel,
        grid=(x.shape[0] // rows,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="doubled",
    )
    return jax.lax.map(lambda x: double(jnp.sin(x)), x[None])


def test_kernels_are_found_within_loops_of_a_program():
    traced = jax.jit(functools.partial(doubled, rows=64)).trace(jnp.zeros((128, 128)))
    assert [call.params["name"] for call in bundles.calls(traced.jaxpr.jaxpr)] == ["doubled"]


@pytest.mark.slow
def test_the_compiler_lists_a_kernel_the_same_twice_and_alone():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    x, chip = (jax.ShapeDtypeStruct((4096, 128), jnp.float32),), Topology.parse("v5e:1x1")
    found = [
        bundles.listings(functools.partial(doubled, rows=rows), x, chip, ["doubled"])["doubled"]
        for rows in (256, 256, 512)
    ]
    assert found[0] == found[1] and found[0].spills == 0
    assert [one.grid.rounds for one in found] == [n + bundles.STAGES for n in (16, 16, 8)]
    assert found[0].parts()[1] < found[2].parts()[1]
    (alone,) = bundles.kernels(functools.partial(doubled, rows=256), x, chip).values()
    # Where operands lie may differ, and copies with it; what is computed is the same.
    assert alone.parts()[1] == pytest.approx(found[0].parts()[1], abs=4)
