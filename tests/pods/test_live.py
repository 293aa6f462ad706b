"""The real compiler, where it is installed: the step that trains, for slices that are not here."""

import dataclasses
import importlib
import importlib.util

import pytest

from experiments import gpt, llama
from lineage_jax.lineage import LINEAGE
from lineage_jax.pods import DoesNotFitError, Request, Topology, make_plan, make_sketch
from lineage_jax.pods.aot import compile_step, sketch_step
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
    ("made", "mesh", "dtype", "kernels"),
    [
        (compile_step, MeshConfig(data=2, fsdp=2, tensor=2), "float32", ATTENTION | {"turn"}),
        (sketch_step, MeshConfig(data=2, stage=2, fsdp=2), "bfloat16", ATTENTION | {"turn"}),
        (sketch_step, MeshConfig(data=1, fsdp=2, context=2, tensor=2), "bfloat16", {"turn"}),
    ],
    ids=["rows and heads", "stages", "ring"],
)
def test_heads_of_128_numbers_are_turned_and_attended_to_by_kernels(made, mesh, dtype, kernels):
    tiny = llama.experiment("tiny")
    sizes = dict(embed_dim=128, num_heads=2, head_dim=128, max_len=256, num_layers=2)
    model = dataclasses.replace(tiny.model, **sizes, dtype=dtype, remat="attention")
    data = dataclasses.replace(tiny.data, seq_len=256)
    hlo = made(request(dataclasses.replace(tiny, model=model, data=data), mesh)).hlo
    assert {name for name in ATTENTION | {"turn"} if f"%{name}" in hlo} == kernels


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


def test_gpt3_fits_512_chips_its_gradients_are_scattered_and_a_sketch_knows():
    largest = gpt.experiment("gpt3_175b")
    largest = dataclasses.replace(
        largest,
        model=dataclasses.replace(largest.model, remat="inner"),
        data=dataclasses.replace(largest.data, batch_size=512),
    )
    pod = Topology.parse("v5p:8x8x8")
    asked = request(largest, MeshConfig(data=1, fsdp=64, tensor=8), pod)
    plan, sketch = make_plan(asked, tokens=3e11), make_sketch(asked, tokens=3e11)
    assert plan.params == 174_604_259_328
    assert plan.fits
    kinds = {(row.kind, row.axes) for row in plan.traffic}
    assert ("reduce-scatter", "fsdp") in kinds
    assert 0.75 < sketch.seconds / plan.seconds < 1.05
    assert 0.85 < sketch.hbm_total / plan.hbm_total < 1.01
    assert sketch.exposed == pytest.approx(plan.exposed, rel=0.02)
    assert sketch.compile_seconds < 0.5 * plan.compile_seconds
    for row, sketched in zip(plan.traffic, sketch.traffic, strict=True):
        assert dataclasses.replace(sketched, exposed=row.exposed) == row
