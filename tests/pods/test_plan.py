"""A plan of a program that was compiled before, and the command that makes one."""

import json
import pathlib

import pytest

from lineage_jax import cli
from lineage_jax.pods import Compiled, Topology, predict
from lineage_jax.pods.aot import does_not_fit

GIB = 2**30


def compiled(**changes) -> Compiled:
    text = (pathlib.Path(__file__).parent / "hlo" / "all_gather_fsdp_v5e.hlo").read_text()
    head, _, text = text.partition("\n")
    given = json.loads(head.removeprefix("// "))
    values = {
        "hlo": text,
        "arguments": 4 * GIB,
        "outputs": 3 * GIB,
        "aliased": 3 * GIB,
        "temporaries": 5 * GIB,
        "code": GIB,
        "parts": {"parameters": GIB, "optimiser": 2 * GIB, "other state": 0, "batch": GIB // 2},
        "num_params": 1000,
        "coords": tuple(tuple(place) for place in given["coords"]),
        "axes": given["axes"],
        "tokens_per_step": 8000,
        "flops_per_token": 6000,
        "compile_seconds": 7.0,
    }
    return Compiled(**{**values, **changes})


V5E = Topology.parse("v5e:2x4")


def test_the_parts_of_the_memory_add_up_to_what_the_compiler_counts():
    one = compiled()
    plan = predict(one, V5E, 1e9)
    assert plan.hbm_total == one.hbm == 10 * GIB
    assert plan.hbm["padding of these"] == GIB // 2
    assert plan.fits


def test_more_than_the_chip_has_does_not_fit():
    plan = predict(compiled(temporaries=12 * GIB), V5E, 1e9)
    assert not plan.fits
    assert any("DOES NOT FIT" in line for line in plan.lines())


def test_speed_cost_and_mfu_follow_from_the_step():
    plan = predict(compiled(), V5E, 1e9)
    assert plan.seconds == pytest.approx(plan.compute + plan.memory + plan.exposed, rel=1e-12)
    assert plan.tokens_per_second_per_chip == pytest.approx(1000 / plan.seconds, rel=1e-12)
    assert plan.mfu == pytest.approx(1000 / plan.seconds * 6000 / 197e12, rel=1e-12)
    assert plan.days == pytest.approx(1e9 / 8000 * plan.seconds / 86400, rel=1e-12)
    assert plan.cost == pytest.approx(plan.days * 24 * 8 * 1.20, rel=1e-12)


def test_a_gather_with_nothing_beside_it_is_bound_by_the_network():
    plan = predict(compiled(), V5E, 1e9)
    assert plan.bound == "network"
    ((row),) = plan.traffic
    assert (row.kind, row.axes, row.count) == ("all-gather", "fsdp", 1)


def test_a_plan_prints_what_it_assumes_and_what_it_cannot_see():
    text = "\n".join(predict(compiled(), V5E, 1e9).lines())
    for told in ("1.5 GHz", "45 GB/s", "1.20 USD", "the host", "stragglers", "data-centre"):
        assert told in text


def test_a_plan_is_json():
    plan = predict(compiled(), V5E, 1e9)
    read = json.loads(plan.to_json())
    assert read["fits"] is True
    assert read["bound"] == "network"
    assert read["seconds"] == plan.seconds
    assert read["traffic"][0]["kind"] == "all-gather"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (22.21G) exceeds available HBM (15.75G).",
            "needs 22.21GiB for temporaries, has 15.75GiB;",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            "needs 20.50GiB for all, has 15.75GiB;",
        ),
        ("RESOURCE_EXHAUSTED: for another reason", "needs more than it has;"),
    ],
)
def test_an_error_of_memory_says_how_much_and_what_to_change(said, told):
    error = does_not_fit(said)
    assert told in str(error)
    assert "--mesh.fsdp" in str(error)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan"], "lineage plan NAME"),
        (["plan", "gtp"], "did you mean gpt"),
        (["plan", "gpt"], "--topology"),
        (["plan", "gpt", "--topology", "v9:2x2"], "wanted a chip of"),
        (["plan", "gpt", "--topology", "v5e:8"], "write it as v5e:4x4"),
        (["plan", "gpt", "--topology", "v5e:2x4", "--mesh.fsdpp", "4"], "--mesh.fsdp"),
    ],
)
def test_a_wrong_command_is_one_line_that_says_what_was_meant(capsys, arguments, told):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "lineage: " in line]
    assert len(lines) == 1
    assert told in lines[0]
