"""The static table of attention on TPUs: what it multiplies, and what the compiler still makes."""

import functools
import importlib.util
import itertools
import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import attention_counts, attention_static, attention_table
from experiments.benchmarks.attention_counts import Shape, chosen_blocks, counts
from experiments.benchmarks.attention_programs import program
from lineage_jax.kernels import PAPER
from lineage_jax.pods.aot import in_a_process
from lineage_jax.pods.bundles import calls, on_chip
from lineage_jax.pods.chips import CHIPS

COMPILED = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'lineage-jax[tpu]' (no TPU needed)",
)
TOLD = json.loads(attention_static.RESULTS.read_text())
SHAPE, LONG = Shape(length=8192), Shape(length=65536)


def tiles(seen, rows, columns):
    """How many tiles of a table are read whole, in part, and not at all."""
    table = seen.reshape(seen.shape[0] // rows, rows, -1, columns)
    whole, some = table.all((1, 3)), table.any((1, 3))
    return int(whole.sum()), int((some & ~whole).sum()), int((~some).sum())


def positions(queries, keys):
    return np.arange(queries)[:, None], np.arange(keys)[None]


def test_tiles_of_full_attention_are_those_of_a_triangle():
    at, key = positions(8192, 8192)
    whole, masked, none = tiles(key <= at, 1024, 1024)
    assert whole + masked + none == 64 and masked == 8
    heads = SHAPE.heads
    found = counts("full", SHAPE)
    ((steps, first, *met, last),) = found["flash_attention_forward"]
    assert met == [heads * whole, heads * masked]
    assert steps == sum(met) and first == last == heads * 8
    ((steps, start, first, *met, last, end),) = found["flash_attention_backward"]
    assert met == [heads * whole, heads * masked] and start == end == SHAPE.groups
    assert counts("splash", SHAPE)["splash_mqa_dq_no_residuals"] == [
        (heads * 64, heads * 8, heads * (whole + masked), heads * 8)
    ]


def test_chunks_of_keys_whose_gradients_do_not_fit_together_meet_the_same_tiles():
    found = counts("full", Shape(length=32768))
    ((_, _, *met, _),) = found["flash_attention_forward"]
    backward = found["flash_attention_backward"]
    assert len(backward) > 1
    assert [sum(part) for part in zip(*(call[3:5] for call in backward), strict=True)] == met


def test_a_tile_of_queries_meets_its_window_in_one_step():
    found, tiles = counts("window", SHAPE), 8192 // 128
    # What the last tile reads of keys is written after it, but for the first row of lanes.
    last = -(-(PAPER.window + 127) // 128)
    assert found["window_forward"] == [tuple(SHAPE.groups * n for n in (tiles, tiles, 0))]
    ((steps, start, met, wide, written),) = found["window_backward"]
    assert (start, met, wide) == (SHAPE.groups, SHAPE.groups * tiles, 0)
    assert (steps, written) == (SHAPE.groups * (tiles + last), SHAPE.groups * tiles)


def test_the_compressed_branch_meets_the_chunks_that_any_query_reads():
    count = SHAPE.compressed
    at, key = positions(8192, count)
    seen = key * PAPER.stride + PAPER.compressed_size - 1 <= at
    ((steps, begun, met, whole, masked, added, looks),) = counts("compressed", SHAPE)[
        "compressed_forward"
    ]
    columns = attention_counts.compressed_tpu.CHUNK
    groups, (wholes, parts, _) = SHAPE.groups, tiles(seen, attention_counts.TILE, columns)
    assert steps == begun == groups * 8192 // attention_counts.TILE
    assert whole == groups * wholes
    # A tile whose first keys of a chunk are not whole yet looks at its blocks all the same.
    assert groups * parts <= masked <= groups * parts + steps
    assert met == added == whole + masked and looks == PAPER.num_blocks * met


@pytest.mark.parametrize("selection", ["random", "clustered"])
def test_blocks_are_drawn_as_the_kernels_choose_them(selection):
    blocks = chosen_blocks(Shape(length=2048, selection=selection))
    own = np.arange(2048) // PAPER.block_size
    assert ((blocks >= 0).sum(1) == np.minimum(own + 1, PAPER.num_blocks)).all()
    assert (blocks <= own[:, None]).all()
    for block in (np.zeros_like(own), own, np.maximum(own - 1, 0)):
        assert (blocks == block[:, None]).any(1).all()
    for row in blocks:
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    alike = (np.sort(blocks[1536:1600]) == np.sort(blocks[1536])).mean()
    assert (alike == 1) == (selection == "clustered")


def test_every_query_is_on_the_lists_of_its_blocks():
    ((steps, heads, lists),) = counts("selected", SHAPE)["selected_backward_keys"]
    assert (steps, heads) == (SHAPE.groups * 128, SHAPE.groups)
    pairs = (chosen_blocks(SHAPE) >= 0).sum() * SHAPE.groups
    assert pairs / attention_counts.TILE <= lists <= pairs / attention_counts.TILE + steps


def test_the_docs_print_the_stored_table():
    assert attention_table.page(TOLD) in attention_table.PAGE.read_text()


def test_all_chips_and_both_lengths_are_stored():
    assert list(TOLD) == list(attention_static.TABLED)
    for chip in TOLD.values():
        assert set(chip["lengths"]) == {"8192", "65536"}
        for of_length in chip["lengths"].values():
            assert set(attention_table.BRANCHES) <= set(of_length)


def test_what_queries_are_computed_with_does_not_depend_on_the_length():
    for chip in TOLD.values():
        short, long = (chip["lengths"][length] for length in ("8192", "65536"))
        for branch in attention_table.BRANCHES:
            for name, kernel in long[branch]["kernels"].items():
                pairs = zip(
                    short[branch]["kernels"][name]["bundles"], kernel["bundles"], strict=True
                )
                for one, other in pairs:
                    if kernel["direction"] == "forward" and one >= 1000:
                        assert other == pytest.approx(one, rel=0.02), (name, one, other)


def release(versions):
    """Without the fourth number, which is of another build of the same compiler."""
    return {name: version.split(".")[:3] for name, version in versions.items()}


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_kernels_have_no_more_bundles_and_spills_than_are_stored(chip):
    stored, versions = TOLD[chip], attention_static.versions()
    if release(stored["versions"]) != release(versions):
        pytest.skip(f"the table is of {stored['versions']}, this is {versions}")
    topology = attention_static.one_chip(chip)
    for branch in attention_table.SPARSE:
        found = attention_static.kernels_of(branch, SHAPE, topology)
        known = stored["lengths"]["8192"][branch]["kernels"]
        assert set(found) == set(known)
        for name, kernel in found.items():
            assert kernel["spills"] <= known[name]["spills"], name
            for most, part in zip(known[name]["bundles"], kernel["bundles"], strict=True):
                assert part <= max(1.02 * most, most + 8), (name, most, part)


def stated(chips):
    """FLOPs that each kernel of the sparse branches says it takes, chip by chip."""
    found = {}
    for chip, branch in itertools.product(chips, attention_table.SPARSE):
        asked, topology = program("backward", branch, LONG), attention_static.one_chip(chip)
        traced = on_chip(asked.function, asked.arguments, topology, "trace")
        for call in calls(traced.jaxpr.jaxpr):
            found[chip, branch, call.params["name"]] = call.params["cost_estimate"].flops
    return found


@pytest.mark.slow
@COMPILED
def test_the_planner_has_the_shares_of_the_peak_that_follow_from_the_table():
    work = functools.partial(stated, attention_static.TABLED)
    found, held = in_a_process((), work), 0
    for (name, branch, kernel), flops in found.items():
        chip = CHIPS[name]
        if kernel in (shares := dict(chip.kernels)) and not kernel.startswith("flash"):
            told = TOLD[name]["lengths"][str(LONG.length)][branch]["kernels"][kernel]
            share = flops / (chip.peak_flops / chip.devices) / (1e-3 * told["milliseconds"])
            assert shares[kernel] == (pytest.approx(share, abs=0.006),) * 2, (name, kernel)
            held += 1
    assert held == 6 * len(attention_static.TABLED)


AHEAD = [
    ("v5e", 65536, "forward", "compressed"),
    ("v5e", 8192, "decode", ""),
    ("v5p", 65536, "decode", ""),
    ("v5p", 8192, "forward", "selected"),
    ("v6e", 65536, "backward", "window"),
    ("tpu7x", 8192, "backward", "compressed"),
    ("tpu7x", 65536, "forward", "selected"),
]
"""A spread: each chip, each length and each direction. `--static all` compiles them all."""


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize(("chip", "length", "what", "branch"), AHEAD)
def test_the_real_compiler_takes_whole_programs(chip, length, what, branch):
    topology = attention_static.one_chip(chip)
    asked = program(what, branch, Shape(length=length))
    one = attention_static.whole(asked, topology)
    given = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(asked.arguments))
    assert 0 < one.temporaries < topology.chip.hbm_bytes / topology.chip.devices - given
