"""Which slice is taken, and what is compiled to find it; nothing is."""

import dataclasses

import pytest

from experiments.launch import slices
from experiments.launch.sizes import FAMILIES
from lineage_jax.pods import CHIPS, Topology, search
from tests.pods.compiler import stub

DAY = 86400


@pytest.fixture(scope="module")
def experiment():
    """A LLaMA of a billion parameters, 256 rows of 2048 tokens a step."""
    made = FAMILIES["llama"].experiment(1e9)
    return dataclasses.replace(made, data=dataclasses.replace(made.data, batch_size=256))


def compiler(monkeypatch, mfu=0.4, room=None, activations=None):
    """A stub; without `room`, whatever it is asked to compile fills its devices and fits."""
    full = lambda request: request.topology.num_chips * request.topology.chip.hbm_bytes  # noqa: E731
    rules = [rule if callable(rule) else lambda _, rule=rule: rule for rule in (mfu, room)]
    return stub(monkeypatch, rules[0], full if room is None else rules[1], activations)


def quiet(line):
    pass


def names(asked):
    return list(dict.fromkeys(request.topology.name for request in asked))


def tokens_for(experiment, days, topology, mfu):
    """As many as a slice reads in so many days."""
    slice_ = Topology.parse(topology)
    rate = mfu * slice_.num_chips * slice_.chip.peak_flops
    return rate / experiment.program().flops_per_token * days * DAY


def test_slices_too_small_for_the_state_are_not_tried():
    found = slices.slices(CHIPS["v5p"], 65e9)  # 780 GB: eight chips have 816, four 408
    assert found[0].name == "v5p:2x2x2"
    assert found[-1].name == "v5p:16x16x24"
    assert [one.num_chips for one in found] == sorted(one.num_chips for one in found)
    with pytest.raises(ValueError, match=r"1e\+13 parameters .* 120 TB, more than 16x16 of v5e"):
        slices.slices(CHIPS["v5e"], 1e13)


def test_the_smallest_slice_is_the_first_that_holds_the_step(monkeypatch, experiment):
    asked = compiler(monkeypatch, room=5e11)
    chosen = slices.smallest(experiment, slices.slices(CHIPS["v5e"], 1e9), 1e11, quiet)
    assert chosen.topology.name == "v5e:4x8"  # 550 GB; 4x4 has 275
    assert names(asked) == ["v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8"]


def test_the_fastest_mesh_is_taken_and_the_batch_kept(monkeypatch, experiment):
    asked = compiler(
        monkeypatch, mfu=lambda request: {1: 0.3, 2: 0.4}.get(request.mesh.tensor, 0.2)
    )
    lines = []
    topology = Topology.parse("v5e:2x4")
    chosen = slices.smallest(experiment, [topology], 1e11, lines.append)
    assert chosen.plan.mesh == {"fsdp": 4, "tensor": 2}
    assert chosen.experiment.data.batch_size == 256
    assert chosen.experiment.train.accumulate == 256 // 4
    assert all(r.accumulate * r.topology.num_devices // r.mesh.tensor == 256 for r in asked)
    assert len(lines) == len(asked)


def test_what_need_not_be_recomputed_is_not(monkeypatch, experiment):
    remat = lambda request: request.program.__self__.model.remat  # noqa: E731
    asked = compiler(monkeypatch, mfu=lambda r: {"full": 0.3, "attention": 0.4}.get(remat(r), 0.2))
    chosen = slices.smallest(experiment, [Topology.parse("v5e:2x4")], 1e11, quiet)
    assert chosen.experiment.model.remat == "attention"
    assert {remat(request) for request in asked} == set(search.REMATS)


@pytest.mark.parametrize(("state", "at_once"), [(0.0, 32), (0.5, 16), (0.95, 1)])
def test_the_fastest_mesh_takes_as_many_rows_as_fit(monkeypatch, experiment, state, at_once):
    """A device holds the state, and a 32nd of its memory for each row at once."""
    each = 2**34 / 32
    rows = lambda request: request.program().batch_size // request.accumulate  # noqa: E731
    shares = lambda request: request.topology.num_devices // request.mesh.tensor  # noqa: E731
    compiler(
        monkeypatch,
        mfu=lambda r: 0.01 * rows(r) / shares(r) / r.mesh.tensor,
        room=lambda r: (state * 2**34 + rows(r) / shares(r) * each) * 8,
        activations=lambda r: rows(r) / shares(r) * each * 8,
    )
    chosen = slices.smallest(experiment, [Topology.parse("v5e:2x4")], 1e11, quiet)
    assert chosen.plan.mesh == {"fsdp": 8}
    assert chosen.experiment.train.accumulate == 256 // 8 // at_once


def test_a_mesh_that_is_slow_with_one_row_may_be_the_fastest_with_many(monkeypatch, experiment):
    rows = lambda r: r.program().batch_size // r.accumulate  # noqa: E731
    alone = lambda r: rows(r) * r.mesh.tensor == r.topology.num_devices  # noqa: E731
    compiler(
        monkeypatch,
        mfu=lambda r: 0.1 * r.mesh.tensor if alone(r) else 0.9 / r.mesh.tensor,
        room=lambda r: rows(r) * 2**30,  # of 128 GiB
    )
    chosen = slices.smallest(experiment, [Topology.parse("v5e:2x4")], 1e11, quiet)
    assert chosen.plan.mesh == {"fsdp": 8}
    assert chosen.plan.mfu == 0.9


def test_a_step_that_needs_next_to_nothing_takes_the_whole_batch_at_once(monkeypatch, experiment):
    compiler(monkeypatch, lambda r: 0.5 / r.accumulate, lambda r: 1.0, lambda r: 0.0)
    chosen = slices.smallest(experiment, [Topology.parse("v5e:2x4")], 1e11, quiet)
    assert chosen.experiment.train.accumulate == 1


def test_a_batch_that_cannot_be_shared_says_what_to_do(monkeypatch, experiment):
    compiler(monkeypatch)
    few = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, batch_size=3))
    lines = []
    with pytest.raises(ValueError, match="no mesh that was tried fits v5e:16x16: take a larger"):
        slices.smallest(few, [Topology.parse("v5e:16x16")], 1e11, lines.append)
    assert all("a batch of 3 rows is no multiple of" in line for line in lines)


def test_in_time_compiles_what_the_estimate_says_and_no_more(monkeypatch, experiment):
    asked = compiler(monkeypatch, mfu=slices.ASSUMED_MFU)
    choices = slices.slices(CHIPS["v5e"], 1e9)
    tokens = tokens_for(experiment, 0.99, "v5e:8x8", slices.ASSUMED_MFU)
    chosen = slices.in_time(experiment, choices, tokens, 1.0, quiet)
    assert chosen.topology.name == "v5e:8x8"
    assert chosen.plan.days == pytest.approx(0.99, rel=1e-9)
    assert names(asked) == ["v5e:8x8"]


@pytest.mark.parametrize(("reached", "taken"), [(0.1, "v5e:16x16"), (0.8, "v5e:4x8")])
def test_in_time_corrects_its_estimate_by_what_is_reached(monkeypatch, experiment, reached, taken):
    asked = compiler(monkeypatch, mfu=reached)
    choices = slices.slices(CHIPS["v5e"], 1e9)
    tokens = tokens_for(experiment, 0.99, "v5e:8x8", slices.ASSUMED_MFU)
    chosen = slices.in_time(experiment, choices, tokens, 1.0, quiet)
    assert names(asked) == ["v5e:8x8", taken]
    assert chosen.topology.name == taken
    assert chosen.plan.days <= 1


@pytest.mark.parametrize("falls", [0.6, 0.7, 0.9, 1.1])
def test_in_time_takes_no_slice_that_half_of_it_would_do_for(monkeypatch, experiment, falls):
    """Each slice reaches `falls` of what the one before does, as more chips talk more."""
    choices = slices.slices(CHIPS["v5e"], 1e9)
    tokens = tokens_for(experiment, 0.99, "v5e:4x4", 0.3)
    compiler(monkeypatch, mfu=lambda request: 0.6 * falls ** choices.index(request.topology))
    chosen = slices.in_time(experiment, choices, tokens, 1.0, quiet)
    assert chosen.plan.days <= 1 < 2 * chosen.plan.days


def test_in_time_says_when_nothing_is(monkeypatch, experiment):
    compiler(monkeypatch)
    with pytest.raises(ValueError, match="no slice up to v5e:16x16 was found to be done in 1 days"):
        choices = slices.slices(CHIPS["v5e"], 1e9)
        slices.in_time(experiment, choices, 1e15, 1.0, quiet)
