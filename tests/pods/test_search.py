"""Which candidates are tried, and how they are ranked; nothing is compiled."""

import math

import pytest

from experiments import gpt
from lineage_jax.pods import CHIPS, SLICES, DoesNotFitError, Topology, search
from tests.pods.compiler import stub

V5E = Topology.parse("v5e:2x4")
SHARES = {"none": 0.9, "dots": 0.4, "inner": 0.35, "attention": 0.3, "full": 0.2}
"""Of a device that a row takes, by what is recomputed."""
SPEED = {"none": 0.05, "dots": 0.045, "inner": 0.043, "attention": 0.042, "full": 0.04}
"""MFU for each row that a device computes at once."""


def remat(request):
    return request.program.__self__.model.remat


def rows(request):
    """That a device computes at once."""
    mesh = request.mesh
    return request.program().batch_size / (mesh.data * mesh.fsdp * mesh.tensor)


@pytest.fixture
def asked(monkeypatch):
    """Of a compiler to which every row takes its share of a device, and whose heads are four."""

    def room(request):
        if request.mesh.tensor > 4:
            raise ValueError("heads do not divide")
        needed = rows(request) * SHARES[remat(request)]
        return needed * request.topology.num_chips * request.topology.chip.hbm_bytes

    def mfu(request):
        mesh = request.mesh
        return SPEED[remat(request)] * rows(request) / mesh.tensor / (1 + 0.1 * mesh.data)

    return stub(monkeypatch, mfu, room)


def test_what_was_compiled_comes_first_and_the_fastest_of_it_before_the_rest(asked):
    lines = []
    tried = search.search(gpt.tiny(), V5E, 1e9, lines.append)
    best = tried[0].candidate
    assert (best.experiment.model.remat, best.rows) == ("full", 4 * 8)  # 0.8 of a device; 8 do not
    assert best.experiment.mesh.fsdp == 8
    assert [one.sketched for one in tried] == [False] * search.SURE + [True] * (len(tried) - 3)
    for some in (tried[: search.SURE], tried[search.SURE :]):
        assert [one.speed for one in some] == sorted((one.speed for one in some), reverse=True)
    assert all(one.fits for one in tried)
    assert len(lines) == len(asked)
    assert [line for line in lines if line.startswith("compiled")] == lines[-search.SURE :]


def test_every_mesh_is_compared_with_whole_blocks_recomputed_and_the_best_go_on(asked):
    search.search(gpt.tiny(), V5E, 1e9, lambda line: None)
    first = {request.mesh for request in asked if remat(request) == "full"}
    meshes = {(mesh.data, mesh.fsdp, mesh.tensor) for mesh in first}
    assert {(1, 8, 1), (2, 4, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2)} <= meshes
    others = [request for request in asked if remat(request) != "full"]
    assert {mesh.tensor for mesh in (request.mesh for request in others)} == {1}
    assert len({request.mesh for request in others}) == search.BEST
    assert {remat(request) for request in others} == set(SHARES) - {"full"}


def test_a_mesh_takes_a_row_for_each_share_and_then_as_many_as_fit(asked):
    search.search(gpt.tiny(), V5E, 1e9, lambda line: None)
    alone = [r for r in asked if r.mesh == asked[0].mesh and remat(r) == "none"]
    assert [rows(request) for request in alone] == [1, 2]  # the second is one too many
    many = [r for r in asked if remat(r) == "full" and r.mesh.tensor == 4 and r.mesh.data == 1]
    assert [rows(request) for request in many] == [0.25, 8, 4]


def test_a_model_with_no_room_to_recompute_less_is_not_asked_to_recompute_nothing(
    monkeypatch, asked
):
    monkeypatch.setitem(SHARES, "inner", 1.5)  # a row is more than a device, on any mesh of these
    tried = search.search(gpt.tiny(), V5E, 1e9, lambda line: None)
    assert {remat(request) for request in asked} == {"full", "attention", "inner"}
    assert tried[0].fits


def test_what_only_a_sketch_fits_is_passed_over(monkeypatch, asked):
    compiles = search.make_plan

    def make_plan(request, tokens):
        if rows(request) == 4:
            raise DoesNotFitError("does not fit: the sketch was short of memory; split it further")
        return compiles(request, tokens)

    monkeypatch.setattr(search, "make_plan", make_plan)
    lines = []
    tried = search.search(gpt.tiny(), V5E, 1e9, lines.append)
    assert not tried[0].sketched
    assert tried[0].candidate.rows == 2 * 8
    assert any(line.startswith("compiled") and "was short" in line for line in lines)


def test_a_mesh_that_does_not_divide_the_model_is_a_line_not_an_end(asked):
    lines = []
    tried = search.search(gpt.tiny(), V5E, 1e9, lines.append)
    refused = [line for line in lines if "heads do not divide" in line]
    assert refused
    assert all("tensor 8" in line for line in refused)
    assert tried[0].fits


def test_a_kept_batch_is_computed_in_parts(asked):
    tried = search.search(gpt.tiny(), V5E, 1e9, lambda line: None, keep_batch=True)
    batch = gpt.tiny().data.batch_size
    for one in tried:
        assert one.candidate.experiment.data.batch_size == batch
        assert one.candidate.experiment.train.accumulate * one.candidate.rows == batch
    assert {request.program().batch_size for request in asked} == {batch}


def test_the_smallest_slice_is_the_first_where_something_fits(monkeypatch):
    asked = stub(monkeypatch, lambda request: 0.5, lambda request: 100 * 2**30)
    slices = [Topology.parse(f"v5e:{shape}") for shape in SLICES["v5e"]]
    tried = search.smallest(gpt.tiny(), slices, 1e9, lambda line: None)
    assert tried[0].candidate.topology.name == "v5e:2x4"  # 128 GiB; 2x2 has 64
    assert tried[0].fits
    assert {request.topology.name for request in asked} == {"v5e:2x2", "v5e:2x4"}
    assert search.smallest(gpt.tiny(), slices[:1], 1e9, lambda line: None) == []


def test_slices_are_in_the_order_of_their_size():
    assert set(SLICES) == set(CHIPS)
    for shapes in SLICES.values():
        sizes = [math.prod(map(int, shape.split("x"))) for shape in shapes]
        assert sizes == sorted(sizes)
