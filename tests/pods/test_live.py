"""The real compiler, where it is installed: the step that trains, for slices that are not here."""

import dataclasses
import importlib
import importlib.util

import pytest

from experiments import gpt, llama
from lineage_jax.lineage import LINEAGE
from lineage_jax.pods import DoesNotFitError, Request, Topology, make_plan, make_sketch
from lineage_jax.pods.aot import compile_step
from lineage_jax.sharding import MeshConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="the TPU compiler is not installed: pip install 'lineage-jax[tpu]' (no TPU needed)",
    ),
]

V5E = Topology.parse("v5e:2x4")


def request(experiment, mesh, topology=V5E):
    return Request(dataclasses.replace(experiment, mesh=mesh).program, topology, mesh)


@pytest.mark.parametrize("name", [milestone.name for milestone in LINEAGE])
def test_every_milestone_is_planned_for_eight_chips(name):
    tiny = importlib.import_module(f"experiments.{name}").experiment("tiny")
    plan = make_plan(request(tiny, MeshConfig(data=1, fsdp=4, tensor=2)), tokens=1e9)
    assert plan.fits
    assert plan.mesh == {"fsdp": 4, "tensor": 2}
    assert plan.seconds > 0
    assert 0 < plan.mfu < 1
    axes = {row.axes for row in plan.traffic}
    assert {"fsdp", "tensor"} <= axes
    assert "fits" in "\n".join(plan.lines())


ATTENTION = {"flash_attention_forward", "inner_products", "flash_attention_backward"}


@pytest.mark.parametrize(
    ("mesh", "dtype", "kernels"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), "float32", ATTENTION | {"turn"}),
        (MeshConfig(data=2, stage=2, fsdp=2), "bfloat16", ATTENTION | {"turn"}),
        (MeshConfig(data=1, fsdp=2, context=2, tensor=2), "bfloat16", {"turn"}),  # the ring
    ],
)
def test_heads_of_128_numbers_are_turned_and_attended_to_by_kernels(mesh, dtype, kernels):
    tiny = llama.experiment("tiny")
    sizes = dict(embed_dim=128, num_heads=2, head_dim=128, max_len=256, num_layers=2)
    model = dataclasses.replace(tiny.model, **sizes, dtype=dtype, remat="attention")
    data = dataclasses.replace(tiny.data, seq_len=256)
    compiled = compile_step(request(dataclasses.replace(tiny, model=model, data=data), mesh))
    assert {name for name in ATTENTION | {"turn"} if f"%{name}" in compiled.hlo} == kernels


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=4), MeshConfig(data=1, tensor=8)])
def test_a_sketch_is_near_the_plan_and_seconds_away(mesh):
    """Of a step that products bound, as those are that anyone plans; `experiments/LOG.md`."""
    small = gpt.experiment("gpt2_small")
    small = dataclasses.replace(small, data=dataclasses.replace(small.data, batch_size=64))
    asked = request(small, mesh)
    plan, sketch = make_plan(asked, tokens=1e9), make_sketch(asked, tokens=1e9)
    assert 0.75 < sketch.seconds / plan.seconds < 1.1
    assert 0.8 < sketch.hbm_total / plan.hbm_total <= 1.01
    assert sketch.compile_seconds < 0.5 * plan.compile_seconds
    assert {(row.kind, row.axes, row.count, row.bytes) for row in sketch.traffic} == {
        (row.kind, row.axes, row.count, row.bytes) for row in plan.traffic
    }


def test_a_model_too_large_for_its_chips_says_how_much_it_needs():
    large = gpt.experiment("gpt3_1_3b")  # 16 bytes a parameter, on each of eight chips
    large = dataclasses.replace(large, data=dataclasses.replace(large.data, batch_size=8))
    with pytest.raises(DoesNotFitError, match=r"needs 2\d\.\d+GiB for .*, has 15\.\d+GiB"):
        make_plan(request(large, MeshConfig(data=8)), tokens=1e9)


def test_a_mesh_that_does_not_divide_the_heads_says_so_from_the_other_process():
    with pytest.raises(ValueError, match="'kv_heads' of 4 does not divide over mesh axis tensor=8"):
        make_plan(request(gpt.tiny(), MeshConfig(data=1, tensor=8)), tokens=1e9)


def test_a_slice_that_libtpu_does_not_have_is_refused():
    strange = Topology.parse("v5e:3x5")
    with pytest.raises(ValueError, match="libtpu has no such slice"):
        make_plan(request(gpt.tiny(), MeshConfig(data=15), strange), tokens=1e9)


def test_gpt3_fits_512_chips_and_its_gradients_are_scattered():
    largest = gpt.experiment("gpt3_175b")
    largest = dataclasses.replace(
        largest,
        model=dataclasses.replace(largest.model, remat="inner"),
        data=dataclasses.replace(largest.data, batch_size=512),
    )
    pod = Topology.parse("v5p:8x8x8")
    plan = make_plan(request(largest, MeshConfig(data=1, fsdp=64, tensor=8), pod), tokens=3e11)
    assert plan.params == 174_604_259_328
    assert plan.fits
    kinds = {(row.kind, row.axes) for row in plan.traffic}
    assert ("reduce-scatter", "fsdp") in kinds
