"""Attention to a window by kernels that meet all keys of a tile of queries in one step."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.attention_counts import Shape
from experiments.benchmarks.attention_programs import program
from lineage_jax.kernels import flash_attention, flash_plain, interval_attention_with_sums
from lineage_jax.kernels.bands import (
    FEW,
    LATE,
    LONGEST,
    MEET,
    TILE_AT,
    WIDE,
    WRITE,
    Band,
    band_of,
    meeting,
    walk,
)
from lineage_jax.kernels.blocks import LANES, MASKED, Expected
from lineage_jax.kernels.heads_tpu import Heads
from lineage_jax.kernels.intervals import Intervals, intervals
from lineage_jax.pods.bundles import kernels
from lineage_jax.pods.topologies import Topology

TOLERANCE = {"float32": (1e-6, 1e-5), "bfloat16": (2e-2, 2e-2)}
"""Of outputs and sums, and of gradients; relative norms."""


def drawn(shape, dtype="float32"):
    """Heads, and the gradients of attended values and of sums.

    Args:
      shape: of batch, T, S, heads, groups, K and E.
      dtype: of heads.
    """
    batch, length, num_keys, heads, groups, width, value_width = shape
    rng = np.random.default_rng(0)
    shapes = [
        (batch, length, heads, width),
        (batch, num_keys, groups, width),
        (batch, num_keys, groups, value_width),
        (batch, length, heads, value_width),
    ]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(rng.normal(size=(batch, heads, length)), "float32")


def read(shape, window, documents=None, offset=0):
    """What is read by queries from `offset` on, in documents of any length."""
    batch, length, num_keys = shape[:3]
    ids = None
    if documents:
        ids = np.sort(np.random.default_rng(1).integers(0, documents, (batch, num_keys)), 1)
        ids = jnp.asarray(ids, jnp.int32)
    return intervals(length, num_keys, window=window, segment_ids=ids, offset=offset)


def distance(found, wanted):
    """Of two arrays, relative to the second's norm."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def assert_reference(arrays, reads, window):
    """Holds the kernels to the table of scores; gives attended values and gradients.

    Args:
      arrays: drawn.
      reads: what is read of them.
      window: how many keys at most.
    """
    *heads, out_grad, sum_grad = arrays
    expected = Expected(diagonal=True, window=window)
    options = dict(expected=expected, implementation="pallas_tpu_interpreted")

    def kernel(*heads):
        return interval_attention_with_sums(*heads, *reads, **options)

    def table(*heads):
        clipped = Intervals(jnp.maximum(reads.first, 0), jnp.minimum(reads.last, num_keys - 1))
        return flash_plain.reference(*heads, clipped)

    def both(attention, *arrays):
        (out, log_sum), back = jax.vjp(attention, *arrays[:3])
        grads = arrays[3].astype(out.dtype), arrays[4]
        return out, log_sum, *back(grads)

    num_keys = heads[1].shape[1]
    found = jax.jit(functools.partial(both, kernel))(*arrays)
    exact = [x.astype(jnp.float32) for x in (*heads, out_grad)]
    wanted = jax.jit(functools.partial(both, table))(*exact, sum_grad)
    of_values, of_gradients = TOLERANCE[str(heads[0].dtype)]
    some = np.asarray(wanted[1]) > MASKED / 2
    assert found[0].dtype == heads[2].dtype
    assert distance(found[0], wanted[0]) < of_values
    assert distance(np.where(some, found[1], 0), np.where(some, wanted[1], 0)) < of_values
    assert (np.asarray(found[1])[~some] == MASKED).all()
    for grad, of, like in zip(found[2:], wanted[2:], heads, strict=True):
        assert grad.dtype == like.dtype
        assert distance(grad, of) < of_gradients
    return found[0], *found[2:]


CASES = {
    "the paper's widths, two groups": ((1, 140, 140, 8, 2, 192, 128), dict(window=60)),
    "values of half a row of lanes": ((1, 140, 140, 4, 1, 128, 64), dict(window=90)),
    "odd widths, documents, two rows": (
        (2, 250, 250, 4, 1, 12, 10),
        dict(window=37, documents=4),
    ),
    "one head for each of the keys": ((2, 250, 250, 2, 2, 64, 64), dict(window=100, documents=3)),
    "three heads, none at the start of a row": ((1, 140, 140, 3, 1, 192, 8), dict(window=128)),
    "more heads than a step takes": ((1, 130, 130, 20, 1, 8, 12), dict(window=60)),
    "a chunk of a prompt": ((1, 140, 700, 4, 1, 64, 64), dict(window=200, offset=201)),
    "a chunk that begins a row of lanes": (
        (2, 140, 700, 4, 1, 12, 10),
        dict(window=200, offset=512, documents=3),
    ),
    "more queries than keys": ((1, 250, 140, 4, 1, 8, 12), dict(window=70)),
    "a window of more keys than there are": ((1, 200, 200, 4, 1, 8, 12), dict(window=512)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_a_table_of_scores_does(name):
    shape, options = CASES[name]
    assert_reference(drawn(shape), read(shape, **options), options["window"])


def test_kernels_compute_it_in_bfloat16():
    shape = (1, 250, 250, 4, 1, 64, 128)
    assert_reference(drawn(shape, "bfloat16"), read(shape, 100, 3), 100)


def test_ends_may_move_less_than_a_key_from_query_to_query():
    shape, at = (1, 300, 200, 4, 1, 8, 12), np.arange(300)
    last = np.where(at < 100, at // 2, np.minimum(at - 50, 180))
    first = np.maximum(last - np.where(at < 200, 60, 20), 0)
    assert_reference(drawn(shape), Intervals(*(jnp.asarray(x)[None] for x in (first, last))), 61)


def test_queries_that_read_nothing_get_nothing_and_give_nothing():
    shape, at = (1, 380, 200, 4, 1, 8, 12), np.arange(380)
    last = np.minimum(at - 140, 199)  # none of the first tile reads anything, and some of others
    first = np.where(at % 9 == 4, last + 1, np.maximum(last - 49, 0))
    reads = Intervals(*(jnp.asarray(x)[None] for x in (np.maximum.accumulate(first), last)))
    empty = np.asarray(reads.first > reads.last)[0]
    assert 140 < empty.sum() < 300 and empty[:140].all() and not empty.all()
    out, of_query, *_ = assert_reference(drawn(shape), reads, 50)
    assert not np.asarray(out)[:, empty].any()
    assert not np.asarray(of_query)[:, empty].any()


def test_no_position_sees_its_future_or_what_is_before_its_window():
    query, keys, values, *_ = drawn((1, 250, 250, 4, 1, 8, 8))

    def one(keys, values):
        options = dict(window=100, implementation="pallas_tpu_interpreted")
        return flash_attention(query, keys, values, **options)[0, 177].sum()

    for grad in jax.jit(jax.grad(one, (0, 1)))(keys, values):
        read = np.abs(np.asarray(grad[0])).sum((1, 2)) > 0
        np.testing.assert_array_equal(np.flatnonzero(read), np.arange(78, 178))


def test_an_offset_may_be_traced():
    shape = (1, 140, 400, 4, 1, 8, 12)
    heads = drawn(shape)[:3]
    options = dict(window=50, implementation="pallas_tpu_interpreted")
    attend = jax.jit(lambda offset, *x: flash_attention(*x, offset=offset, **options))
    for offset in (0, 77, 256):
        wanted = flash_plain.reference(*heads, read(shape, 50, offset=offset))[0]
        assert distance(attend(jnp.asarray(offset), *heads), wanted) < 1e-6


def band(shape, window, backward=False, lists=1):
    batch, length, num_keys, heads, groups, width, value_width = shape
    return band_of(
        *((batch, length, heads, width), (batch, num_keys, groups, width), value_width),
        Expected(diagonal=True, window=window),
        lists=lists,
        backward=backward,
    )


PLACES = [
    ((1, 1000, 1000, 16, 1, 8, 8), dict(window=300)),
    ((2, 1000, 1000, 4, 1, 8, 8), dict(window=300, documents=9)),
    ((2, 700, 2000, 2, 2, 8, 8), dict(window=200, offset=333)),
    ((1, 700, 2000, 8, 2, 8, 8), dict(window=512, offset=1024, documents=5)),
    ((1, 1500, 600, 4, 1, 8, 8), dict(window=128)),
    ((1, 300, 300, 4, 1, 8, 8), dict(window=1000)),
]


@pytest.mark.parametrize(("shape", "options"), PLACES)
@pytest.mark.parametrize("backward", [False, True])
def test_every_tile_meets_all_keys_that_it_reads(shape, options, backward):
    reads = read(shape, **options)
    b = band(shape, options["window"], lists=reads.first.shape[0])
    if backward:
        b = Band(**{**vars(b), "tiles": 1, "length": -(-shape[1] // LANES) * LANES})
    whole = b.padded(reads)
    bases, begins, wide = map(np.asarray, meeting(b, whole))
    sizes = np.repeat(np.where(wide, b.wide, b.columns), b.tiles, 1)
    from_base = begins - np.repeat(bases, b.tiles, 1)
    assert (from_base >= 0).all() and (from_base + sizes <= b.fetched).all()
    assert (bases >= 0).all() and (bases + b.fetched <= b.num_keys).all()
    assert not (begins % LANES).any() and not (bases % LANES).any()
    first, last = (np.asarray(x).reshape(*begins.shape, LANES) for x in whole)
    some = first <= last
    assert (~some | (first >= begins[..., None])).all()
    assert (~some | (last < (begins + sizes)[..., None])).all()
    if options.get("offset", 0) % LANES == 0:
        assert not wide.any() or b.wide == b.columns


@pytest.mark.parametrize(("shape", "options"), PLACES)
def test_every_tile_is_met_once_and_all_keys_are_written_after_it(shape, options):
    reads = read(shape, **options)
    b = band(shape, options["window"], lists=reads.first.shape[0])
    b = Band(**{**vars(b), "tiles": 1, "length": -(-shape[1] // LANES) * LANES})
    whole, ring = b.padded(reads), b.wide // LANES
    bases, begins, wide = map(np.asarray, meeting(b, whole))
    codes, blocks, steps = map(np.asarray, walk(b, whole))
    assert steps <= codes.shape[1]
    for row, (code, block) in enumerate(zip(codes[:, :steps], blocks[:, :steps], strict=True)):
        meets, writes, tiles = code & MEET > 0, code & WRITE > 0, code >> TILE_AT
        np.testing.assert_array_equal(tiles[meets], np.arange(b.steps))
        np.testing.assert_array_equal(block[writes], np.arange(b.num_keys // LANES))
        np.testing.assert_array_equal(block[meets], bases[row] // LANES)
        np.testing.assert_array_equal((code[meets] & WIDE) > 0, wide[row])
        late = (code[meets] & LATE) > 0
        np.testing.assert_array_equal(block[meets] + late, begins[row] // LANES)
        assert (np.diff(tiles) >= 0).all() and (np.diff(block) >= 0).all()
        assert (block[meets] + ring <= b.num_keys // LANES).all()
        assert not code[np.flatnonzero(writes)[-1] + 1 :].any() or b.steps == tiles.max() + 1


def test_windows_that_are_long_or_not_known_are_left_to_others():
    shape = (1, 4096, 4096, 16, 1, 192, 128)
    assert band(shape, 512) and band(shape, LONGEST)
    assert band(shape, LONGEST + 1) is None and band(shape, None) is None
    alone = (1, 4096, 4096, FEW - 1, 1, 192, 128)
    assert band(alone, 512) and band(alone, 512, backward=True) is None
    wide = ((1, 4096, 16, 8), (1, 4096, 1, 8), 8)
    assert band_of(*wide, Expected(window=512), lists=1) is None
    assert band((1, 2**23, 2**23, 16, 1, 8, 8), 512, lists=2) is None


def test_a_step_takes_heads_or_tiles_of_queries():
    def cut(heads, groups, length=4096, window=512):
        b = band((1, length, length, heads, groups, 192, 128), window)
        return b.together, b.tiles, b.columns, b.wide, b.fetched

    assert cut(64, 4) == (16, 1, 640, 768, 768)
    assert cut(32, 8) == (4, 4, 640, 768, 1152)
    assert cut(8, 8) == (1, 8, 640, 768, 1664)
    assert cut(34, 1) == (2, 8, 640, 768, 1664)
    assert cut(16, 1, length=300) == (16, 1, 384, 384, 384)
    assert cut(2, 2, length=300) == (1, 3, 384, 384, 384)


@pytest.mark.parametrize("width", [64, 128, 192, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_heads_are_found_in_the_blocks_of_a_step(width, count):
    heads, steps = Heads(width, count), 2
    array = jnp.arange(16 * steps * count * width).reshape(1, 16, steps * count, width) * 1.0
    stored = heads.stored(array)
    assert stored.shape == heads.shape(1, 16, steps * count)
    np.testing.assert_array_equal(heads.unstored(stored), array)
    spec = heads.spec(16, lambda n, h, i: (n, h, i))
    for step in range(steps):
        places = zip(spec.block_shape, spec.index_map(0, step, 0), strict=True)
        block = stored[tuple(i if n is None else slice(i * n, (i + 1) * n) for n, i in places)]
        for head in range(count):
            found = block[heads.at(head, slice(0, 16))]
            np.testing.assert_array_equal(found, array[0, :, step * count + head])


COMPILED = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'lineage-jax[tpu]' (no TPU needed)",
)


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize(
    ("chip", "heads"),
    [
        ("tpu7x:1x1x1", (16, 4, 192, 128)),
        ("v6e:1x1", (32, 8, 64, 64)),
        ("v4:1x1x1", (16, 4, 128, 128)),
    ],
)
def test_the_real_compiler_takes_the_kernels_forward_and_backward(chip, heads):
    num_heads, groups, width, value_width = heads
    shape = Shape(length=8192, heads=num_heads, groups=groups, width=width, value_width=value_width)
    asked = program("backward", "window", shape)
    found = kernels(asked.function, asked.arguments, Topology.parse(chip))
    assert set(found) == {"window_forward", "window_backward"}
