"""Native Sparse Attention is what the paper's loops say, in every implementation that runs here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lineage_jax.kernels import (
    Branches,
    NSAConfig,
    compress,
    empty_nsa_cache,
    native_sparse_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
    window_attention,
)
from lineage_jax.kernels.native_sparse.api import check
from tests.kernels import native_sparse_loops

IMPLEMENTATIONS = ("reference", "xla")

SMALL = NSAConfig(
    compressed_size=8, stride=4, block_size=8, num_blocks=4, num_first=1, num_local=2, window=9
)
UNEVEN = NSAConfig(
    compressed_size=6, stride=3, block_size=12, num_blocks=2, num_first=0, num_local=1, window=17
)
APART = NSAConfig(
    compressed_size=5, stride=5, block_size=5, num_blocks=5, num_first=2, num_local=3, window=1
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    config: NSAConfig
    positions: int = 45
    queries: int | None = None
    heads: int = 4
    groups: int = 2
    segmented: bool = False
    offset: int = 0

    def arrays(self, dtype="float32"):
        """Queries, keys, values and gates, as float32 or bfloat16 numbers in float64 arrays."""
        rng = np.random.default_rng(0)
        length = self.queries or self.positions
        count = self.config.num_compressed(self.positions)

        def normal(*shape):
            return np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64)

        def branches(width):
            return Branches(
                *(normal(2, n, self.groups, width) for n in (count, *(self.positions,) * 2))
            )

        query, gates = normal(2, length, self.heads, 12), normal(2, length, self.heads, 3)
        return query, branches(12), branches(10), gates

    def segments(self):
        if not self.segmented:
            return None
        starts = [[0] * 13 + [1] + [2] * (self.positions - 14), [7] * self.positions]
        return np.asarray(starts)

    @property
    def options(self):
        ids = self.segments()
        ids = None if ids is None else jnp.asarray(ids, jnp.int32)
        return dict(config=self.config, segment_ids=ids, offset=self.offset)


CASES = {
    "small": Case(config=SMALL),
    "one group of many heads": Case(config=SMALL, heads=5, groups=1),
    "as many groups as heads": Case(config=UNEVEN, heads=3, groups=3),
    "blocks apart": Case(config=APART),
    "documents": Case(config=SMALL, segmented=True),
    "uneven": Case(config=UNEVEN, segmented=True),
    "a chunk of a prompt": Case(config=SMALL, queries=14, offset=19, segmented=True),
    "shorter than a block": Case(config=UNEVEN, positions=2, offset=0),
    "the paper's sizes": Case(config=NSAConfig(num_blocks=3), positions=260, queries=6, offset=254),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@functools.cache
def loops(case):
    return native_sparse_loops.native_sparse_attention(
        *case.arrays(), case.config, case.segments(), case.offset
    )


def cast(arrays, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)


def distance(actual, expected):
    """Of two arrays, relative to the second's norm."""
    actual = np.asarray(actual, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def total(case, implementation, *arrays):
    """A weighted sum of the results, of which the gradients are compared; and the results."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    out = native_sparse_attention(*arrays, **case.options, implementation=implementation)
    weights = np.random.default_rng(1).normal(size=out.shape).astype("float32")
    return (out * weights).sum(), out


gradients = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)


@functools.cache
def exact(case, dtype):
    """What the reference gives in float64, and its gradients."""
    with jax.enable_x64(True):
        call = jax.jit(gradients(functools.partial(total, case, "reference")))
        (_, out), grads = call(*cast(case.arrays(dtype), "float64"))
        return jax.tree.map(np.asarray, (out, grads))


@cases
def test_the_reference_is_what_loops_over_heads_and_keys_say(case):
    assert distance(exact(case, "float32")[0], loops(case)[0]) < 1e-12


@implementations
@cases
def test_the_blocks_are_those_of_the_loops_in_order(case, implementation):
    query, keys, _, _ = cast(case.arrays(), "float32")
    found = select_blocks(
        query, keys.compressed, case.positions, **case.options, implementation=implementation
    )
    for (b, i, g), expected in loops(case)[1].items():
        missing = case.config.num_blocks - len(expected)
        assert found[b, i, g].tolist() == expected + [-1] * missing


@pytest.mark.parametrize(
    ("name", "dtype", "implementation"),
    [
        *(
            (name, dtype, implementation)
            for implementation in IMPLEMENTATIONS
            for name, dtype in (
                *((name, "float32") for name in CASES),
                ("documents", "bfloat16"),
                ("uneven", "bfloat16"),
            )
        ),
        ("a chunk of a prompt", "float32", "pallas_tpu_interpreted"),
        ("a chunk of a prompt", "float32", "pallas_gpu_interpreted"),
    ],
)
def test_results_and_gradients_are_those_of_the_reference_in_float64(name, dtype, implementation):
    case = CASES[name]
    call = jax.jit(gradients(functools.partial(total, case, implementation)))
    (_, out), grads = call(*cast(case.arrays(dtype), dtype))
    expected_out, expected_grads = exact(case, dtype)
    forward, backward = (1e-6, 1e-5) if dtype == "float32" else (2e-2, 2e-2)
    assert out.dtype == dtype and distance(out, expected_out) < forward
    for grad, expected in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        assert grad.dtype == dtype
        if not expected.any():  # no compressed key is whole
            assert not grad.any()
        else:
            assert distance(grad, expected) < backward


@pytest.mark.parametrize("name", ["uneven", "a chunk of a prompt"])
def test_the_reference_has_the_gradients_of_finite_differences(name):
    with jax.enable_x64(True):
        arrays = cast(CASES[name].arrays(), "float64")
        call = jax.jit(lambda *arrays: total(CASES[name], "reference", *arrays)[0])
        check_grads(call, arrays, order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


@implementations
def test_no_position_sees_its_future_or_another_document(implementation):
    case = CASES["documents"]
    query, keys, values, gates = cast(case.arrays(), "float32")
    squeeze = functools.partial(jnp.mean, axis=-2)

    def of_one(at, keys, values):
        raw = (keys.selected, values.selected)
        squeezed = (compress(x, squeeze, case.config) for x in raw)
        branches = [Branches(x, y, y) for x, y in zip(squeezed, raw, strict=True)]
        out = native_sparse_attention(
            query, *branches, gates, **case.options, implementation=implementation
        )
        return out[0, at].sum()

    gradient = jax.jit(jax.grad(of_one, argnums=(1, 2)))
    for at, reads in ((12, range(13)), (13, [13]), (30, range(14, 31))):
        of_keys, of_values = (
            set(np.flatnonzero(np.abs(found.selected).sum((0, 2, 3))).tolist())
            for found in gradient(at, keys, values)
        )
        assert of_keys <= of_values <= set(reads) and at in of_values


@implementations
def test_a_query_reads_as_many_keys_as_configured_and_no_more(implementation):
    case = CASES["small"]
    query, keys, values, _ = cast(case.arrays(), "float32")
    blocks = select_blocks(query, keys.compressed, case.positions, **case.options)
    at = 43  # its own block is cut off after four positions

    def selected(values):
        out = selected_attention(
            query, keys.selected, values, blocks, config=SMALL, implementation=implementation
        )
        return out[:, at].sum()

    def window(values):
        out = window_attention(
            query, keys.window, values, SMALL.window, implementation=implementation
        )
        return out[:, at].sum()

    read = np.asarray(jax.grad(selected)(values.selected)).any(-1)  # B S G
    assert (read.sum(1) == 3 * SMALL.block_size + 4).all()
    for b, g in np.ndindex(2, 2):
        assert set(np.flatnonzero(read[b, :, g]) // SMALL.block_size) == set(
            blocks[b, at, g].tolist()
        )
    read = np.asarray(jax.grad(window)(values.window)).any(-1)
    assert (read.sum(1) == SMALL.window).all() and read[:, at - SMALL.window + 1 : at + 1].all()


@implementations
@pytest.mark.parametrize("segmented", [False, True])
def test_with_everything_selected_it_is_full_attention(implementation, segmented):
    everything = dataclasses.replace(SMALL, num_blocks=6)
    case = Case(config=everything, segmented=segmented)
    query, keys, values, gates = cast(case.arrays(), "float32")
    only_selected = jnp.zeros_like(gates).at[..., 1].set(1)
    out = native_sparse_attention(
        query, keys, values, only_selected, **case.options, implementation=implementation
    )
    mask = jnp.tril(jnp.ones((45, 45), bool))[None, None]
    if segmented:
        ids = case.segments()
        mask = mask & jnp.asarray(ids[:, None, :, None] == ids[:, None, None, :])
    expected = jax.nn.dot_product_attention(
        query, keys.selected, jnp.pad(values.selected, ((0, 0),) * 3 + ((0, 2),)), mask=mask
    )[..., :10]
    assert distance(out, expected) < 1e-6


@implementations
def test_queries_may_stand_anywhere_among_the_keys(implementation):
    case = CASES["small"]
    query, keys, values, gates = cast(case.arrays(), "float32")
    options = dict(config=SMALL, implementation=implementation)
    whole = native_sparse_attention(query, keys, values, gates, **options)

    @jax.jit
    def chunk(offset):
        here = (jax.lax.dynamic_slice_in_dim(x, offset, 7, axis=1) for x in (query, gates))
        query_, gates_ = here
        return native_sparse_attention(query_, keys, values, gates_, offset=offset, **options)

    for offset in (0, 11, 38):
        assert distance(chunk(offset), np.asarray(whole[:, offset : offset + 7])) < 1e-6


def squeezes():
    """A learned map, one for keys and one for values."""
    rng = np.random.default_rng(2)
    weights = (jnp.asarray(rng.normal(size=(8, width)), "float32") for width in (12, 10))
    return tuple(functools.partial(jnp.einsum, "pk,...pk->...k", w) for w in weights)


def raw(case):
    """As `arrays`, but what the compressed branch squeezes is not squeezed yet."""
    query, keys, values, gates = cast(case.arrays(), "float32")
    rng = np.random.default_rng(3)
    new = (jnp.asarray(rng.normal(size=x.selected.shape), "float32") for x in (keys, values))
    keys, values = (x._replace(compressed=y) for x, y in zip((keys, values), new, strict=True))
    return query, keys, values, gates


@jax.jit
def decode(*given, mask=None):
    return nsa_decode(*given, squeezes(), config=SMALL, mask=mask)


def piece(arrays, begin, end):
    return jax.tree.map(lambda x: x[:, begin:end], arrays)


def at_once(case, arrays):
    """The whole at once, by the reference."""
    query, keys, values, gates = arrays
    branches = (
        x._replace(compressed=compress(x.compressed, squeeze, case.config))
        for x, squeeze in zip((keys, values), squeezes(), strict=True)
    )
    out = native_sparse_attention(
        query, *branches, gates, config=case.config, implementation="reference"
    )
    return np.asarray(out)


@pytest.mark.parametrize("lengths", [[1] * 45, [21, 3] + [1] * 21], ids=["tokens", "pieces"])
def test_decoding_through_the_cache_is_the_whole_row_by_row(lengths):
    case = CASES["small"]
    arrays = raw(case)

    @jax.jit
    def step(arrays, cache, begin):
        positions = begin + jnp.broadcast_to(
            jnp.arange(arrays[0].shape[1]), (2, arrays[0].shape[1])
        )
        return nsa_decode(
            *arrays, cache, positions, squeezes(), config=SMALL, implementation=implementation
        )

    cache, outs = empty_nsa_cache(2, 45, 2, 12, 10, "float32", SMALL), []
    shapes = jax.tree.map(jnp.shape, cache)
    for begin, length in zip(np.cumsum([0, *lengths]), lengths):  # noqa: B905
        positions = jnp.broadcast_to(begin + jnp.arange(length)[None], (2, length))
        out, cache = decode(*piece(arrays, begin, begin + length), cache, positions)
        outs.append(out)
    assert jax.tree.map(jnp.shape, cache) == shapes
    assert distance(jnp.concatenate(outs, axis=1), at_once(case, arrays)) < 1e-6


def test_rows_go_on_where_their_prompts_end_and_padding_is_not_read():
    case, prompts = CASES["small"], np.asarray([21, 10])
    arrays = raw(case)
    expected = at_once(case, arrays)
    cache = empty_nsa_cache(2, 45, 2, 12, 10, "float32", SMALL)
    positions = np.broadcast_to(np.arange(21), (2, 21))
    mask = positions < prompts[:, None]
    spoilt = jax.tree.map(
        lambda x: jnp.where(mask.reshape(2, 21, *(1,) * (x.ndim - 2)), x[:, :21], 100.0), arrays
    )
    out, cache = decode(*spoilt, cache, jnp.asarray(positions), mask=jnp.asarray(mask))
    for row, length in enumerate(prompts):
        assert distance(out[row, :length], expected[row, :length]) < 1e-6
    for i in range(24):
        at = prompts + i
        next_ = jax.tree.map(lambda x, at=at: x[np.arange(2), at][:, None], arrays)
        out, cache = decode(*next_, cache, jnp.asarray(at)[:, None])
        assert distance(out[:, 0], expected[np.arange(2), at]) < 1e-6


def test_compression_takes_each_stride_s_positions_and_fills_up_the_end():
    heads = np.random.default_rng(0).normal(size=(2, 10, 1, 3)).astype("float32")
    weights = np.asarray([1, 10, 100, 1e3, 1e4, 1e5], "float32")
    found = compress(
        jnp.asarray(heads), functools.partial(jnp.einsum, "p,...pk->...k", weights), UNEVEN
    )
    padded = np.pad(heads, ((0, 0), (0, 6), (0, 0), (0, 0)))
    expected = [np.einsum("p,bpgk->bgk", weights, padded[:, i : i + 6]) for i in (0, 3, 6, 9)]
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(stride=5), "stride=5 must divide compressed_size=32"),
        (dict(block_size=40), "stride=16 must divide block_size=40"),
        (dict(compressed_size=128), "compressed_size=128 must be at most block_size=64"),
        (dict(num_blocks=2), "num_blocks=2 must have room for num_first=1 and num_local=2"),
        (dict(window=0), "window must be at least 1, got 0"),
        (dict(num_local=-1), "num_local must be at least 0, got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        NSAConfig(**changed)


def test_arrays_that_do_not_fit_are_refused():
    query, keys, values, gates = cast(CASES["small"].arrays(), "float32")

    def call(query=query, keys=keys, values=values, gates=gates, **options):
        return native_sparse_attention(query, keys, values, gates, config=SMALL, **options)

    with pytest.raises(ValueError, match=r"keys.compressed of shape \(2, 12, 2, 12\), got"):
        call(keys=keys._replace(compressed=keys.selected))
    with pytest.raises(ValueError, match=r"values.window of shape \(2, 45, 2, 10\), got"):
        call(values=values._replace(window=keys.window))
    # Of what signatures say the tests' type checker speaks first.
    with pytest.raises(ValueError, match=r"wanted gates of shape \(2, 45, 4, 3\), got"):
        check(query, keys, values, gates[..., :2], SMALL, None)
    with pytest.raises(ValueError, match=r"segment_ids of shape \(2, 45\), got \(2, 44\)"):
        check(query, keys, values, gates, SMALL, jnp.zeros((2, 44), int))
    with pytest.raises(ValueError, match="2 heads of keys and values must divide 3 heads"):
        call(query=query[:, :, :3], gates=gates[:, :, :3])
    with pytest.raises(ValueError, match="at most as many queries as keys, 45, got 46"):
        call(query=jnp.zeros((2, 46, 4, 12)), gates=jnp.zeros((2, 46, 4, 3)))
    with pytest.raises(ValueError, match=r"an implementation of 'reference', 'xla', .*, got 'no'"):
        call(implementation="no")
    with pytest.raises(ValueError, match="'pallas_tpu' is compiled for a TPU, and this is a cpu"):
        call(implementation="pallas_tpu")
