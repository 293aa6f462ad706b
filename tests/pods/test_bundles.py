"""A compiler's listing of a kernel is read as its loops, with their bundles, and its spills."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lineage_jax.pods import bundles
from lineage_jax.pods.bundles import Listing, Loop
from lineage_jax.pods.topologies import Topology

LISTING = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0  ;;  %s2 = inlined_call_operand.hbm
    is told on a line of its own }
   0x1   :  { %s3 = smov 1 }
   0x2 LB: > { %v1 = vld %s1 }
   0x3   :  {}
   0x4 LB: >> { %v2 = vadd %v1 }
   0x5   :  {}
   0x6   : >> { %p1 = scmp.ge.s32.totalorder %s9, 16 /* loop exit test */ }
   0x7   : >> { %9 = sbr.rel (!%p1) target = $region4 }
   0x8 LB: >> { %v3 = vmul %v1 }
   0x9   : >> { %9 = sbr.rel (!%p2) target = $region8 }
   0xa   : > { %9 = sbr.rel (!%p3) target = $region2 }
   0xb   :  {}
"""

USE = """\
== CAPACITY:
MXU, XLU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL
    4     3     3     3     1     1
== UTILIZATION:
0 0 1 0 0 0
2 0 0 1 0 2
"""


def test_loops_are_read_with_what_is_in_them():
    whole = bundles.loops(LISTING)
    assert whole == Loop(3, (Loop(3, (Loop(4), Loop(2))),))


def test_cycles_are_bundles_times_the_trips_of_each_loop_in_order():
    listing = Listing(bundles.loops(LISTING), spills=0)
    assert listing.cycles([10, 16, 3.5]) == 3 + 10 * (3 + 16 * 4 + 3.5 * 2)
    with pytest.raises(ValueError, match="wanted trips of 3 loops, got 1"):
        listing.cycles([10])


def test_spills_are_those_of_both_units():
    assert bundles.spills(USE) == 3


def test_the_newest_listing_of_a_kernel_is_found_by_its_name(tmp_path):
    for name, text in (("8-other-03", ""), ("7-kernel.1-03", ""), ("9-kernel-03", LISTING)):
        (tmp_path / f"{name}-final_bundles.txt").write_text(text)
    (tmp_path / "9-kernel-01-final_hlo-static-per-bundle-utilization.txt").write_text(USE)
    assert bundles.listing(tmp_path, "kernel") == Listing(bundles.loops(LISTING), 3)
    with pytest.raises(RuntimeError, match="listed no kernel called 'kern'"):
        bundles.listing(tmp_path, "kern")


def doubled(x, *, rows):
    """A kernel of one loop."""
    from jax.experimental import pallas as pl

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    block = pl.BlockSpec((rows, 128), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // rows,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="doubled",
    )(x)


@pytest.mark.slow
def test_the_compiler_lists_a_kernel_the_same_twice():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    x = (jax.ShapeDtypeStruct((1024, 128), jnp.float32),)
    found = [
        bundles.listings(
            functools.partial(doubled, rows=rows), x, Topology.parse("v5e:1x1"), ["doubled"]
        )["doubled"]
        for rows in (64, 64, 128)
    ]
    assert found[0] == found[1] and found[0].spills == 0
    assert len(found[0].whole) == 1  # the grid
    assert found[0].whole.inner[0].bundles < found[2].whole.inner[0].bundles
