"""Flash attention is softmax(q k / sqrt(K)) v, in outputs, sums and gradients, at odd sizes."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.kernels import blocks as blocks_module
from lineage_jax.kernels import flash as flash_module
from lineage_jax.kernels import (
    flash_attention,
    interval_attention,
    interval_attention_with_sums,
    intervals,
)
from lineage_jax.kernels.blocks import FIRST, HIDDEN, KEYS_AT, LAST, QUERIES_AT, READ, Expected
from lineage_jax.kernels.flash import check, chosen, expectation
from lineage_jax.kernels.flash_backward_tpu import PARTS
from lineage_jax.kernels.flash_tpu import FORWARD, within
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.pods.bundles import listings
from lineage_jax.pods.topologies import Topology

TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3}  # bfloat16 rounds to 2^-9 of itself


def formula(query, keys, values, seen):
    """In float64 on the host: heads one by one, the table of scores whole."""
    share = query.shape[2] // keys.shape[2]
    keys, values = (np.repeat(x, share, 2) for x in (keys, values))
    scores = np.einsum("bthk,bshk->bhts", query, keys) / math.sqrt(query.shape[-1])
    weights = np.where(seen, np.exp(scores - scores.max()), 0)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_sum = np.log(total[..., 0]) + scores.max()
    weights = weights / np.where(total > 0, total, 1)
    return np.einsum("bhts,bshe->bthe", weights, values), log_sum, weights


def gradients(query, keys, values, seen, out_grad, sum_grad):
    """What calculus says of it, written out."""
    _, _, weights = formula(query, keys, values, seen)
    groups, share = keys.shape[2], query.shape[2] // keys.shape[2]
    scale = 1 / math.sqrt(query.shape[-1])
    wide_keys, wide_values = (np.repeat(x, share, 2) for x in (keys, values))
    of_weights = np.einsum("bthe,bshe->bhts", out_grad, wide_values)
    inner = (weights * of_weights).sum(-1, keepdims=True)
    of_scores = weights * (of_weights - inner + sum_grad[..., None]) * scale
    of_query = np.einsum("bhts,bshk->bthk", of_scores, wide_keys)
    of_keys = np.einsum("bhts,bthk->bshk", of_scores, query)
    of_values = np.einsum("bhts,bthe->bshe", weights, out_grad)

    def grouped(x):
        return x.reshape(*x.shape[:2], groups, share, x.shape[-1]).sum(3)

    return of_query, grouped(of_keys), grouped(of_values)


def distance(actual, expected):
    """Of two arrays, relative to the second's norm."""
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def made(shape, dtype="float32", seed=0):
    """Heads, and the gradients of attended values and of sums.

    Args:
      shape: of batch, T, S, heads, groups, K and E.
      dtype: of heads.
      seed: of what is drawn.
    """
    batch, length, num_keys, heads, groups, width, value_width = shape
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, length, heads, width),
        (batch, num_keys, groups, width),
        (batch, num_keys, groups, value_width),
        (batch, length, heads, value_width),
    ]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(rng.normal(size=(batch, heads, length)), "float32")


def assert_formula(attention, arrays, seen):
    """Holds outputs, sums and gradients to the formula; gives attended values and gradients.

    Args:
      attention: of query, keys and values, giving attended values and sums.
      arrays: made.
      seen: the table of what is read, [B, 1, T, S].
    """

    @jax.jit
    def both(query, keys, values, *grads):
        found, back = jax.vjp(attention, query, keys, values)
        return *found, *back(grads)

    out, log_sum, *grads = both(*arrays)
    exact = [np.asarray(x, np.float64) for x in arrays]
    tolerance = TOLERANCE[str(arrays[0].dtype)]
    expected, expected_log_sum, _ = formula(*exact[:3], seen)
    some = np.broadcast_to(seen.any(-1), log_sum.shape)
    assert out.dtype == arrays[2].dtype
    assert distance(out, expected) < tolerance
    assert distance(np.where(some, log_sum, 0), np.where(some, expected_log_sum, 0)) < tolerance
    assert (np.asarray(log_sum)[~some] < -1e29).all()
    for grad, like, of in zip(
        grads, arrays[:3], gradients(*exact[:3], seen, *exact[3:]), strict=True
    ):
        assert grad.dtype == like.dtype
        assert distance(grad, of) < tolerance
    return np.asarray(out), *map(np.asarray, grads)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 128 positions, and two tiles of keys to a chunk: several of all that there is."""
    monkeypatch.setattr(blocks_module, "TILE", 128)

    def chunks_for(width):
        monkeypatch.setattr(blocks_module, "CHUNK_BYTES", 2 * 4 * 128 * width)

    return chunks_for


def table(reads, num_keys):
    at = np.arange(num_keys)
    first, last = (np.asarray(x)[..., None] for x in reads)
    return ((first <= at) & (at <= last))[:, None]


CASES = {
    "whole tiles": ((2, 256, 256, 2, 2, 16, 16), {}, "float32"),
    "documents, a window and padding": (
        (2, 130, 130, 4, 2, 12, 10),
        dict(window=37, documents=4),
        "float32",
    ),
    "three tiles, the last one padded": ((1, 300, 300, 4, 1, 24, 8), {}, "float32"),
    "documents of many tiles": ((2, 520, 520, 2, 1, 8, 8), dict(documents=4), "float32"),
    "documents, both ways": (
        (2, 300, 300, 2, 1, 8, 8),
        dict(documents=4, causal=False),
        "float32",
    ),
    "more keys than queries": ((2, 140, 390, 2, 1, 8, 12), dict(causal=False), "float32"),
    "more queries than keys": ((1, 300, 140, 2, 1, 8, 12), dict(causal=False), "float32"),
    "a chunk of a prompt": ((2, 140, 400, 4, 2, 12, 10), dict(offset=201, documents=3), "float32"),
    "wider than a row of lanes": ((1, 128, 128, 2, 1, 192, 128), dict(documents=2), "float32"),
    "columns of positions' heads": ((2, 300, 300, 4, 2, 128, 128), dict(documents=3), "float32"),
    "bfloat16": ((2, 256, 256, 2, 1, 64, 32), dict(documents=3), "bfloat16"),
}


def case(shape, options):
    """The options of `flash_attention`, and the table of what is read."""
    options = dict(options)
    batch, length, num_keys = shape[:3]
    causal, window = options.get("causal", True), options.get("window")
    position = options.get("offset", 0) + np.arange(length)[:, None] - np.arange(num_keys)
    seen = np.broadcast_to(position >= 0 if causal else True, (batch, 1, length, num_keys)).copy()
    if window is not None:
        seen &= position < window
    if count := options.pop("documents", None):
        ids = np.sort(np.random.default_rng(1).integers(0, count, (batch, num_keys)), 1)
        at = options.get("offset", 0) + np.arange(length)
        seen &= (ids[:, at, None] == ids[:, None])[:, None]
        options["segment_ids"] = jnp.asarray(ids, jnp.int32)
    return options, seen


def attention_of(shape, options, implementation):
    """Attended values and sums of the cases, by an implementation."""
    reads = intervals(*shape[1:3], **options)
    expected = expectation(options.get("causal", True), options.get("window"))
    options = dict(expected=expected, implementation=implementation)
    return lambda *heads: interval_attention_with_sums(*heads, *reads, **options)


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_the_formula(small_tiles, name):
    shape, options, dtype = CASES[name]
    small_tiles(sum(shape[-2:]))
    options, seen = case(shape, options)
    attention = attention_of(shape, options, "pallas_tpu_interpreted")
    assert_formula(attention, made(shape, dtype), seen)


def test_large_tiles_are_computed_in_parts():
    shape = (1, 1100, 1100, 2, 1, 8, 8)
    options, seen = case(shape, dict(documents=2))
    blocks = blocks_module.cut((1, 1100, 2, 8), (1, 1100, 1, 8), 8, expectation(True, None))
    assert (blocks.rows, blocks.columns, blocks.num_rows) == (768, 768, 2)
    for parts in (FORWARD, PARTS[256]):
        assert len(within(768, parts.keys)) > 1 < len(within(768, parts.queries))
    assert_formula(attention_of(shape, options, "pallas_tpu_interpreted"), made(shape), seen)


@pytest.mark.parametrize("parts", [FORWARD, *PARTS.values()])
def test_each_part_is_begun_weighed_and_added_once_in_order(parts):
    blocks = blocks_module.cut((1, 1024, 1, 8), (1, 1024, 1, 8), 8, Expected())
    begun, weighed, added = [], [], []

    def begin(*part):
        begun.append(part)
        return part

    def middle(given, *part):
        assert given == part
        weighed.append(part)
        assert len(begun) == min(len(weighed) + parts.ahead, len(wanted))
        return part

    def end(given, *part):
        assert given == part
        added.append(part)

    keys, queries = within(1024, parts.keys), within(1024, parts.queries)
    wanted = [(a, b) for a in keys for b in queries]
    parts.run(blocks, begin, middle, end)
    assert begun == weighed == added == wanted
    assert keys[0].start == queries[0].start == 0
    assert keys[-1].stop == queries[-1].stop == 1024


PLAIN = (
    "documents, a window and padding",
    "documents, both ways",
    "a chunk of a prompt",
    "bfloat16",
)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", PLAIN)
def test_tables_and_tiles_without_kernels_compute_the_formula(name, implementation):
    shape, options, dtype = CASES[name]
    options, seen = case(shape, options)
    assert_formula(attention_of(shape, options, implementation), made(shape, dtype), seen)


all_implementations = pytest.mark.parametrize(
    "implementation", ["reference", "xla", "pallas_tpu_interpreted", "pallas_gpu_interpreted"]
)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu_interpreted"])
def test_windows_and_offsets_may_be_traced(implementation):
    shape = (1, 130, 200, 2, 1, 8, 8)
    query, keys, values, grad, _ = made(shape)
    _, seen = case(shape, dict(window=50, offset=60))

    @jax.jit
    def both(window, offset, *heads):
        options = dict(window=window, offset=offset, implementation=implementation)
        out, back = jax.vjp(lambda *heads: flash_attention(*heads, **options), *heads)
        return out, back(grad)

    out, grads = both(jnp.asarray(50), jnp.asarray(60), query, keys, values)
    exact = [np.asarray(x, np.float64) for x in (query, keys, values, grad)]
    assert distance(out, formula(*exact[:3], seen)[0]) < 1e-6
    expected = gradients(*exact[:3], seen, exact[3], np.zeros((1, 2, 130)))
    for found, of in zip(grads, expected, strict=True):
        assert distance(found, of) < 1e-6


@functools.cache
def squeezed(length, stride, size, starts):
    """What queries read of keys that stand for several positions, of which all must be behind."""
    at = np.arange(length)
    begin = np.zeros(length, int)
    for start in starts:
        begin[start:] = start
    return Intervals(-(-begin // stride)[None], ((at - size + 1) // stride)[None])


@all_implementations
def test_queries_that_read_nothing_get_nothing_and_give_nothing(small_tiles, implementation):
    shape = (2, 300, 75, 4, 2, 12, 10)
    small_tiles(22)
    reads = squeezed(300, 4, 8, (0, 101, 103, 290))
    seen = table(reads, 75)
    empty = ~seen[0, 0].any(-1)
    assert 0 < empty.sum() < 60
    assert empty[[0, 6, 101, 105, 295]].all()
    attention = functools.partial(
        interval_attention_with_sums,
        first=jnp.asarray(reads.first),
        last=jnp.asarray(reads.last),
        implementation=implementation,
    )
    arrays = made(shape)
    out, of_query, *_ = assert_formula(attention, arrays, np.broadcast_to(seen, (2, 1, 300, 75)))
    assert not out[:, empty].any()
    assert not of_query[:, empty].any()


@all_implementations
def test_rows_of_which_no_query_reads_anything_are_zero(small_tiles, implementation):
    query, keys, values, grad, _ = made((2, 200, 300, 2, 1, 8, 8))
    small_tiles(16)
    nothing = (jnp.zeros((2, 200), jnp.int32), jnp.full((2, 200), -1))
    options = dict(implementation=implementation)

    @jax.jit
    def both(*heads):
        out, back = jax.vjp(lambda *x: interval_attention(*x, *nothing, **options), *heads)
        return out, *back(grad)

    for x in both(query, keys, values):
        np.testing.assert_array_equal(x, 0)


@all_implementations
def test_no_position_sees_its_future_or_another_document(implementation):
    query, keys, values, *_ = made((1, 130, 130, 2, 1, 8, 8))
    ids = jnp.asarray([[0] * 40 + [1] * 90])

    def one(keys, values):
        options = dict(segment_ids=ids, implementation=implementation)
        return flash_attention(query, keys, values, **options)[0, 77].sum()

    for grad in jax.jit(jax.grad(one, (0, 1)))(keys, values):
        read = np.abs(np.asarray(grad[0])).sum((1, 2)) > 0
        np.testing.assert_array_equal(np.flatnonzero(read), np.arange(40, 78))


def test_more_pairs_of_tiles_than_fit_are_computed_in_several_calls(monkeypatch, small_tiles):
    shape = (1, 400, 400, 2, 1, 8, 8)
    small_tiles(16)
    monkeypatch.setattr(flash_module, "PAIRS", 8)  # two tiles of queries, times four of keys
    attention = attention_of(shape, {}, "pallas_tpu_interpreted")
    assert str(jax.make_jaxpr(attention)(*made(shape)[:3])).count("pallas_call[") == 2
    assert_formula(attention, made(shape), case(shape, {})[1])


def steps_of(pairs, rows):
    """Tiles of queries and keys, and flags, of the steps of each row of a list."""
    codes = np.asarray(pairs.codes).reshape(rows, -1)[:, : int(pairs.steps)]
    keys = (codes >> KEYS_AT) & ((1 << (QUERIES_AT - KEYS_AT)) - 1)
    return codes >> QUERIES_AT, keys, codes & ((1 << KEYS_AT) - 1)


@pytest.mark.parametrize("window", [None, 1024, 200])
@pytest.mark.parametrize("starts", [[[], [600]], [[256], [100, 130, 380, 900]]])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_tiles_that_no_query_reads_are_neither_fetched_nor_computed(window, starts, chunk):
    ids = np.zeros((2, 1024), int)
    for row, places in enumerate(starts):
        for place in places:
            ids[row, place:] += 1
    options = dict(window=window) if window else dict(causal=False)
    reads = intervals(1024, 1024, segment_ids=jnp.asarray(ids), **options)
    blocks = blocks_module.Blocks(
        batch=2, heads=1, groups=1, length=1024, num_keys=1024, width=8, value_width=8,
        rows=128, columns=128,
    )  # fmt: skip
    chosen = {} if chunk is None else dict(chunk=chunk, size=3)
    steps = steps_of(blocks_module.pairs_of(blocks, reads, **chosen), 2)
    tiles = table(reads, 1024).reshape(2, 8, 128, 8, 128).swapaxes(2, 3)
    if chunk is not None:
        tiles[:, :, [j for j in range(8) if j // 3 != chunk]] = False
    for row, (queries, keys, flags) in enumerate(zip(*steps, strict=True)):
        read = flags & READ > 0
        found = list(zip(queries[read], keys[read], strict=True))
        wanted = list(zip(*np.nonzero(tiles[row].any((2, 3))), strict=True))
        assert found == wanted  # in order, each once
        for i, j, flag in zip(queries[read], keys[read], flags[read], strict=True):
            assert (flag & HIDDEN == 0) == tiles[row, i, j].all()
        visited = queries[flags > 0]
        assert set(visited) == set(range(8)) if chunk is None else visited.size
        for i in set(visited):
            own = flags[(queries == i) & (flags > 0)]
            assert own[0] & FIRST and own[-1] & LAST
            assert not (own[1:] & FIRST).any() and not (own[:-1] & LAST).any()
        last = (flags > 0).sum() - 1
        assert (queries[last:] == queries[last]).all() and (keys[last:] == keys[last]).all()


def test_the_tiles_that_are_expected_are_counted():
    heads = dict(query=(1, 8192, 1, 8), keys=(1, 8192, 1, 8), value_width=8)
    causal, full = (
        blocks_module.cut(**heads, expected=Expected(diagonal=diagonal))
        for diagonal in (True, False)
    )
    assert (causal.pairs, causal.masked) == (36, 8 / 36)  # 8 x 9 / 2, of which the diagonal
    assert (full.pairs, full.masked) == (64, 0)
    squeezed = dict(heads, keys=(1, 512, 1, 8), expected=Expected(diagonal=True))
    assert blocks_module.cut(**squeezed).pairs == 8


def test_tiles_are_large_without_much_padding_and_smaller_for_a_short_window():
    def tile(length, num_keys, window=None):
        expected = Expected(diagonal=True, window=window)
        blocks = blocks_module.cut((1, length, 1, 8), (1, num_keys, 1, 8), 8, expected)
        return blocks.rows, blocks.columns, blocks.length, blocks.num_keys

    assert tile(8192, 8192) == (1024, 1024, 8192, 8192)
    assert tile(300, 5000) == (384, 1024, 384, 5120)
    assert tile(2300, 1500) == (768, 768, 2304, 1536)
    assert tile(8192, 8192, 512)[:2] == (512, 512)
    assert tile(8192, 8192, 4096)[:2] == (1024, 1024)


X = jnp.zeros((1, 128, 2, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash_attention(X, X, X, causal=False, window=3), "window needs causal"),
        (lambda: flash_attention(X, X, X, window=0), "at least 1 key, got 0"),
        (lambda: flash_attention(X, X, X, implementation="pallas_tpu"), "a cpu: ask for 'xla'"),
        (lambda: chosen("pallas"), "an implementation of 'reference', .* got 'pallas'"),
        (lambda: intervals(64, 128, segment_ids=jnp.zeros((1, 64), int)), "documents of 128 keys"),
        (lambda: intervals(64, 64, offset=1, segment_ids=jnp.zeros((1, 64), int)), "position 64"),
        (lambda: check(X, X, X[:, :64], *intervals(128, 128)), r"values of shape \(1, 128, 2, 8\)"),
        (lambda: check(X, X, X, *intervals(64, 128)), r"first of shape \(1, 128\)"),
        (lambda: check(X[:, :, :1], X, X, *intervals(128, 128)), "2 heads .* 1 heads"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_a_tpu_tiles_in_plain_jnp_are_taken():
    x = jnp.zeros((1, 128, 1, 8))
    assert "pallas_call" not in str(jax.make_jaxpr(flash_attention)(x, x, x))


def gradients_at_the_size_of_a_paper(query, keys, values):
    """Forward and backward, sent to the process that compiles."""
    loss = lambda *heads: flash_attention(*heads).astype(jnp.float32).sum()  # noqa: E731
    return jax.grad(loss, (0, 1, 2))(query, keys, values)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'lineage-jax[tpu]' (no TPU needed)",
)
def test_the_real_compiler_takes_the_kernels_forward_and_backward():
    shapes = [(1, 8192, 16, 192), (1, 8192, 2, 192), (1, 8192, 2, 128)]
    heads = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    names = ("flash_attention_forward", "flash_attention_backward", "inner_products")
    topology = Topology.parse("v6e:1x1")  # for a v5e: tests/pods/test_live.py
    assert set(listings(gradients_at_the_size_of_a_paper, heads, topology, names)) == set(names)
