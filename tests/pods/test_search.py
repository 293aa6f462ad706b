"""Which candidates are tried, and how they are ranked; nothing is compiled."""

import math

import pytest

from experiments import gpt
from lineage_jax.pods import DoesNotFitError, Topology, search
from lineage_jax.pods.chips import CHIPS
from lineage_jax.pods.plan import Plan

V5E = Topology.parse("v5e:2x4")
SHARES = {"none": 0.9, "dots": 0.4, "inner": 0.35, "attention": 0.3, "full": 0.2}
"""Of a chip that a row takes, by what is recomputed."""


@pytest.fixture
def compiler(monkeypatch):
    """A compiler to which every row takes its share of a chip."""
    asked = []

    def make_plan(request, tokens):
        experiment = request.program.__self__
        asked.append(experiment)
        mesh = experiment.mesh
        if mesh.tensor > 4:
            raise ValueError("heads do not divide")
        rows = experiment.data.batch_size / (mesh.data * mesh.fsdp)
        used = rows * SHARES[experiment.model.remat] / mesh.tensor
        if used > 1:
            raise DoesNotFitError("does not fit: a device needs more; split it further")
        return plan(used, speed=rows / mesh.tensor)

    monkeypatch.setattr(search, "make_plan", make_plan)
    return asked


def plan(used, speed):
    return Plan(
        topology="v5e:2x4",
        chips=8,
        mesh={},
        params=1,
        tokens_per_step=1,
        hbm={"all": round(used * 100)},
        hbm_limit=100,
        compute=1.0,
        memory=0.0,
        exposed=0.0,
        network=0.0,
        traffic=(),
        tokens_per_second_per_chip=speed,
        mfu=0.5,
        tokens=1e9,
        days=1.0,
        cost=None,
        compile_seconds=1.0,
        assumptions=(),
    )


def test_the_fastest_that_fits_comes_first(compiler):
    lines = []
    tried = search.search(gpt.tiny(), V5E, 1e9, lines.append)
    best = tried[0].candidate
    assert (best.remat, best.rows) == ("full", 4 * 8)  # eight rows a device would be too many
    assert [one.speed for one in tried] == sorted((one.speed for one in tried), reverse=True)
    assert len(lines) == len(tried) == len(compiler)


def test_every_mesh_is_compared_at_a_row_for_each_device_and_the_best_go_on(compiler):
    search.search(gpt.tiny(), V5E, 1e9, lambda line: None)
    first = [one for one in compiler if one.model.remat == "full" and one.data.batch_size == 8]
    meshes = {(one.mesh.data, one.mesh.fsdp, one.mesh.tensor) for one in first}
    assert {(1, 8, 1), (2, 4, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2)} <= meshes
    others = [one for one in compiler if one.model.remat != "full"]
    assert len({one.mesh for one in others}) == search.BEST
    assert {one.model.remat for one in others} == set(search.REMATS) - {"full"}


def test_rows_that_do_not_fit_are_not_followed_by_more(compiler):
    tried = search.search(gpt.tiny(), V5E, 1e9, lambda line: None)
    best = tried[0].candidate.experiment.mesh
    rows = [
        one.candidate.rows
        for one in tried
        if one.candidate.remat == "none" and one.candidate.experiment.mesh == best
    ]
    assert sorted(rows) == [8, 16]  # the second is one too many; 32 was not tried


def test_a_mesh_that_does_not_divide_the_model_is_a_line_not_an_end(compiler):
    tried = search.search(gpt.tiny(), V5E, 1e9, lambda line: None)
    refused = [one for one in tried if "heads" in one.why]
    assert {one.candidate.experiment.mesh.tensor for one in refused} == {8}
    assert all("heads do not divide" in one.line() for one in refused)


def test_the_smallest_slice_is_the_first_where_something_fits(compiler):
    tried = search.smallest(gpt.tiny(), CHIPS["v5e"], 1e9, lambda line: None)
    assert tried[0].candidate.topology.name == "v5e:2x2"
    assert tried[0].fits


def test_slices_are_in_the_order_of_their_size():
    for shapes in search.SLICES.values():
        sizes = [math.prod(map(int, shape.split("x"))) for shape in shapes]
        assert sizes == sorted(sizes)
