"""What collectives send and how long that takes, against counts by hand."""

import itertools

import pytest

from lineage_jax.pods.collectives import Collective, groups
from lineage_jax.pods.network import HOP_SECONDS, Torus
from lineage_jax.pods.topologies import Topology

MB = 2**20


def torus(name):
    """Devices in the order of the coordinates, the last the fastest."""
    topology = Topology.parse(name)
    coords = tuple(itertools.product(*(range(extent) for extent in topology.shape)))
    return Torus(topology, coords)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 3 * MB),  # its own megabyte to three others, or passes three on
        ("all-reduce", 2 * 3 * MB // 4),  # a reduce-scatter and an all-gather of quarters
        ("reduce-scatter", 3 * MB // 4),
        ("all-to-all", 3 * MB // 4),
        ("collective-permute", MB),
    ],
)
def test_a_ring_of_four_sends_what_the_algorithms_need(kind, sent):
    assert Collective(kind, MB, ((0, 1, 2, 3),)).wire == sent


def test_a_line_of_four_gathers_through_one_link_at_its_end():
    v5e = torus("v5e:2x4")
    seconds = v5e.seconds(Collective("all-gather", MB, ((0, 1, 2, 3), (4, 5, 6, 7))))
    assert seconds == pytest.approx(3 * HOP_SECONDS + 3 * MB / 45e9, rel=1e-12)


def test_a_ring_of_sixteen_gathers_through_two_links():
    v5e = torus("v5e:16x16")
    ring = tuple(range(16))
    seconds = v5e.seconds(Collective("all-gather", MB, (ring,)))
    assert seconds == pytest.approx(8 * HOP_SECONDS + 15 * MB / 90e9, rel=1e-12)


def test_a_whole_torus_gathers_through_four_links():
    v5e = torus("v5e:16x16")
    seconds = v5e.seconds(Collective("all-gather", MB, (tuple(range(256)),)))
    assert seconds == pytest.approx(16 * HOP_SECONDS + 255 * MB / 180e9, rel=1e-12)


def test_an_all_reduce_takes_as_long_as_a_reduce_scatter_and_an_all_gather():
    v5p = torus("v5p:4x4x4")
    group = (tuple(range(16)),)
    reduce = v5p.seconds(Collective("all-reduce", MB, group))
    scatter = v5p.seconds(Collective("reduce-scatter", MB, group))
    gather = v5p.seconds(Collective("all-gather", MB // 16, group))
    hops = 4 * HOP_SECONDS
    assert reduce - hops == pytest.approx(scatter + gather - 2 * hops, rel=1e-12)


def test_groups_that_lie_between_each_other_share_their_links():
    v5e = torus("v5e:16x16")
    near = v5e.seconds(Collective("all-gather", MB, ((0, 1, 2, 3),)))
    far = v5e.seconds(Collective("all-gather", MB, ((0, 4, 8, 12),)))
    # A ring, so twice the links of the line, and four groups on each.
    assert far - 8 * HOP_SECONDS == pytest.approx((near - 3 * HOP_SECONDS) * 4 / 2, rel=1e-12)


def test_an_all_to_all_on_a_ring_takes_a_quarter_of_gathering_as_much():
    v5e = torus("v5e:16x16")
    ring = (tuple(range(16)),)
    swap = v5e.seconds(Collective("all-to-all", 16 * MB, ring)) - 8 * HOP_SECONDS
    gather = v5e.seconds(Collective("all-gather", 16 * MB, ring)) - 8 * HOP_SECONDS
    assert swap == pytest.approx(gather * 16 / 15 / 4, rel=1e-12)


def test_neighbours_on_a_ring_pass_on_at_the_speed_of_one_link():
    v5e = torus("v5e:16x16")
    shift = tuple((i, (i + 1) % 16) for i in range(16))
    seconds = v5e.seconds(Collective("collective-permute", MB, shift))
    assert seconds == pytest.approx(HOP_SECONDS + MB / 45e9, rel=1e-12)


def test_on_a_line_the_last_passes_to_the_first_over_every_link():
    v5e = torus("v5e:2x4")
    shift = tuple((i, (i + 1) % 4) for i in range(4))
    seconds = v5e.seconds(Collective("collective-permute", MB, shift))
    assert seconds == pytest.approx(3 * HOP_SECONDS + MB / 45e9, rel=1e-12)  # the other way


def test_a_group_of_one_sends_nothing():
    alone = Collective("all-reduce", MB, ((0,), (1,)))
    assert alone.wire == 0
    assert torus("v5e:2x4").seconds(alone) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x", ((0, 2), (1, 3))),
        ("replica_groups={}, x", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", ((0, 1), (2, 3))),
    ],
)
def test_groups_are_read_in_each_way_that_they_are_written(text, expected):
    assert groups(text, 4) == expected


def test_groups_in_an_unknown_way_are_an_error():
    with pytest.raises(ValueError, match="cannot read the groups"):
        groups("replica_groups=a mesh", 4)


def test_a_collective_is_told_by_the_axes_that_differ_in_its_groups():
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    assert Collective("all-reduce", 1, ((0, 1), (2, 3))).axes(mesh) == "tensor"
    assert Collective("all-reduce", 1, ((0, 2), (1, 3))).axes(mesh) == "fsdp"
    assert Collective("all-reduce", 1, ((0, 1, 2, 3),)).axes(mesh) == "fsdp x tensor"
