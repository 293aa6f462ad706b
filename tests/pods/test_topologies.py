"""Names of slices, right and wrong; none needs libtpu."""

import sys

import pytest

from lineage_jax.pods.chips import CHIPS
from lineage_jax.pods.topologies import Topology
from lineage_jax.sharding import MeshConfig
from lineage_jax.train.metrics import PEAK_FLOPS


def test_a_name_is_a_chip_and_a_shape():
    topology = Topology.parse("v5p:4x4x8")
    assert (topology.chip.name, topology.shape, topology.num_chips) == ("v5p", (4, 4, 8), 128)
    assert topology.name == "v5p:4x4x8"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("v9:2x2", "wanted a chip of v4, v5e, v5p, v6e, tpu7x"),
        ("v5e", "2 dimensions, got ''; write it as v5e:4x4"),
        ("v5e:2x2x2", "2 dimensions, got '2x2x2'"),
        ("v5p:8x8", "3 dimensions, got '8x8'; write it as v5p:4x4x4"),
        ("v5e:0x4", "2 dimensions, got '0x4'"),
    ],
)
def test_a_wrong_name_is_answered_with_how_to_write_it(text, told):
    with pytest.raises(ValueError, match=told):
        Topology.parse(text)


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v5e:4x4", (False, False)),
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
    ],
)
def test_only_whole_dimensions_close_to_rings(name, wraps):
    assert Topology.parse(name).wraps == wraps


def test_a_chip_of_two_devices_counts_both():
    assert Topology.parse("tpu7x:2x2x1").num_devices == 8


def test_a_mesh_of_another_size_is_refused_before_libtpu_is_asked():
    with pytest.raises(ValueError, match="choose axes whose product is 8"):
        Topology.parse("v5e:2x4").mesh(MeshConfig(data=1, fsdp=3))


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError, match=r"pip install 'lineage-jax\[tpu\]'"):
        Topology.parse("v5e:2x4").devices()


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_plan_and_a_run_take_their_mfu_of_the_same_peak(chip):
    if chip.device_kind in PEAK_FLOPS:  # of a device
        assert chip.peak_flops / chip.devices == PEAK_FLOPS[chip.device_kind]
