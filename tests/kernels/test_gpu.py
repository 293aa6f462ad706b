"""The kernels for GPU, interpreted, are the reference; and they are lowered for CUDA."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxlib.mlir import ir

from lineage_jax.kernels import (
    Branches,
    Intervals,
    NSAConfig,
    empty_nsa_cache,
    flash,
    flash_attention,
    flash_backward_gpu,
    flash_gpu,
    intervals,
    native_sparse_attention,
    nsa_decode,
    tiles_gpu,
)
from lineage_jax.kernels.native_sparse import (
    compressed_gpu,
    decode_gpu,
    reference,
    selected_backward_gpu,
    selected_gpu,
)
from lineage_jax.kernels.native_sparse.selectors import selectors
from lineage_jax.kernels.tiles_gpu import Tiles
from tests.kernels import test_flash, test_native_sparse_tpu
from tests.kernels.test_native_sparse_tpu import ODD, Case, distance

# The newest jax says so of every kernel by Triton (docs/sparse_attention.md).
pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

SMALL = {2: Tiles(16, 32, 4, 2), 4: Tiles(32, 16, 4, 2)}
WIDE = NSAConfig(
    compressed_size=16, stride=8, block_size=40, num_blocks=2, num_first=0, num_local=1
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of all that there is, and of what is there in parts."""
    for module, names in {
        flash_gpu: ["FORWARD"],
        flash_backward_gpu: ["QUERIES", "KEYS"],
        selected_gpu: ["FORWARD"],
        selected_backward_gpu: ["QUERIES", "KEYS"],
        compressed_gpu: ["WORTH"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, SMALL)
    monkeypatch.setattr(selected_backward_gpu, "SEGMENT", 16)
    monkeypatch.setattr(compressed_gpu, "TABLE_BYTES", 1)


@pytest.mark.parametrize(
    ("shape", "options", "dtype", "programs"),
    [
        ((2, 70, 70, 4, 2, 12, 10), dict(window=37, documents=4), "float32", 1),
        ((1, 50, 90, 6, 1, 100, 24), dict(offset=33, documents=3), "float32", 10**9),
        ((1, 60, 40, 2, 2, 192, 128), dict(causal=False), "bfloat16", 1),
    ],
    ids=["documents, a window and padding", "a chunk of a prompt", "more queries than keys"],
)
def test_flash_attention_and_its_gradients_are_the_formula(
    monkeypatch, small_tiles, shape, options, dtype, programs
):
    monkeypatch.setattr(flash_backward_gpu, "PROGRAMS", programs)
    options, seen = test_flash.case(shape, options)
    attention = test_flash.attention_of(shape, options, "pallas_gpu_interpreted")
    test_flash.assert_formula(attention, test_flash.made(shape, dtype), seen)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, positions=70, heads=2, segmented=True),
        Case(positions=70, queries=33, heads=6, config=ODD),
        Case(positions=100, heads=16, groups=1, width=24, dtype="bfloat16", config=WIDE),
    ],
    ids=["heads of their own", "later queries of three heads", "blocks in parts"],
)
def test_the_selected_branch_and_its_gradients_are_those_of_the_reference(small_tiles, case):
    arrays, reads = case.arrays(case.positions)
    blocks, config = case.blocks(), case.config

    @jax.jit
    def ours(query, keys, values, grad):
        given, options = (query, keys, values, blocks), dict(interpret=True)
        out, log_sum = selected_gpu.selected_forward(*given, config, reads, **options)
        both = *given, out, log_sum, grad, config, reads
        return out, log_sum, selected_backward_gpu.selected_backward(*both, **options)

    @jax.jit
    def theirs(query, keys, values, grad):
        attend = functools.partial(
            reference.selected_attention, blocks=blocks, config=config, reach=reads
        )
        out, pull = jax.vjp(attend, query, keys, values)
        return out, pull(grad)

    out, log_sum, grads = ours(*arrays)
    expected, expected_grads = theirs(*test_native_sparse_tpu.exact(arrays))
    tolerances = (1e-6, 1e-5) if case.dtype == "float32" else (5e-3, 2e-2)
    assert out.dtype == arrays[0].dtype
    assert distance(out, expected) < tolerances[0]
    assert np.isfinite(log_sum).all()
    for grad, like, of in zip(grads, arrays, expected_grads, strict=False):
        assert grad.dtype == like.dtype
        assert distance(grad, of) < tolerances[1]


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, positions=90, segmented=True, config=WIDE),
        Case(positions=70, queries=33, heads=6, config=ODD),
        Case(positions=90, heads=2, dtype="bfloat16", config=test_native_sparse_tpu.LONG),
    ],
    ids=["five keys to a block", "one key to a block", "nothing is forced"],
)
def test_the_compressed_branch_and_its_choice_are_those_of_the_reference(small_tiles, case):
    length, config = case.positions, case.config
    arrays, reads = case.arrays(config.num_compressed(length))
    given = length, config, reads
    ours = jax.jit(lambda *x: compressed_gpu.compressed_forward(*x, *given, interpret=True))
    theirs = jax.jit(lambda *x: reference.compressed_attention(*x, *given))
    out, log_sum, blocks = ours(*arrays[:3])
    expected, expected_blocks = theirs(*test_native_sparse_tpu.exact(arrays[:3]))
    assert out.dtype == arrays[0].dtype
    assert distance(out, expected) < (1e-6 if case.dtype == "float32" else 5e-3)
    assert np.isfinite(log_sum).all()
    np.testing.assert_array_equal(blocks, expected_blocks)


def test_a_token_reads_of_the_cache_what_it_does_without_kernels(monkeypatch):
    monkeypatch.setattr(decode_gpu, "TILES", Tiles(16, 16, 4, 2))
    monkeypatch.setattr(decode_gpu, "PIECE", 32)
    config = dataclasses.replace(WIDE, window=21)
    rng, squeeze = np.random.default_rng(0), (functools.partial(jnp.mean, axis=-2),) * 2
    cache = empty_nsa_cache(3, 100, 2, 12, 10, "float32", config)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), cache)
    new = [(3, 1, 6, 12), *((3, 1, 2, width) for width in (12, 10)), (3, 1, 6, 3)]
    query, keys, values, gates = (jnp.asarray(rng.normal(size=x), "float32") for x in new)
    keys, values = (Branches(x, x, x) for x in (keys, values))
    at = jnp.asarray([[93], [8], [0]])
    given = query, keys, values, gates, cache, at, squeeze
    call = functools.partial(nsa_decode, *given, config=config)
    (out, kept), (expected, expected_kept) = (
        jax.jit(functools.partial(call, implementation=name))()
        for name in ("pallas_gpu_interpreted", "xla")
    )
    assert distance(out, expected) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, kept, expected_kept)


def sizes_of(case, queries):
    (query, keys, values, _), _ = case.arrays(case.positions)
    tiles = Tiles(queries * case.heads // case.groups, 16, 4, 2)
    return selected_gpu.sizes(query, keys, values, case.config.num_blocks, case.config, tiles)


def test_a_tile_meets_each_block_that_any_of_its_queries_selected_once():
    case = Case(batch=2, positions=70, queries=33, heads=8, config=ODD)
    s, blocks = sizes_of(case, 4), np.asarray(case.blocks())
    unions = jax.jit(lambda blocks: selected_gpu.unions(blocks, s))
    found, counts = map(np.asarray, unions(blocks))
    for b, g, i in np.ndindex(found.shape[:3]):
        here = blocks[b, 4 * i : 4 * i + 4, g]
        codes = found[b, g, i, : counts[b, g, i, 0]]
        assert (codes >> 16).tolist() == sorted(set(here[here >= 0].tolist()))
        for code in codes:
            who = [n for n, row in enumerate(here) if code >> 16 in row]
            assert code & 0xFFFF == sum(1 << n for n in who)


def test_every_query_is_in_a_segment_of_each_block_that_it_selected(monkeypatch):
    monkeypatch.setattr(selected_backward_gpu, "SEGMENT", 8)
    case = Case(batch=2, positions=70, config=ODD)
    s, blocks = sizes_of(case, 4), np.asarray(case.blocks())

    @jax.jit
    def lists(blocks):
        bounds, pairs = selectors(blocks, s.count)
        return pairs, *selected_backward_gpu.cut_lists(s, bounds, pairs.shape[-1])

    pairs, segments, of_blocks = map(np.asarray, lists(blocks))
    for b, g, j in np.ndindex(2, case.groups, s.count):
        begin, end = of_blocks[b, g, j]
        found = []
        for block, first, last in segments[b, g, begin:end]:
            assert block == j and 0 < last - first <= 8
            found += pairs[b, g, first:last].tolist()
        assert found == np.flatnonzero((blocks[b, :, g] == j).any(-1)).tolist()
        assert j + 1 == s.count or end == of_blocks[b, g, j + 1, 0]
    assert (segments[0, 0, of_blocks[0, 0, -1, 1] :, 1:] == 0).all()


@pytest.mark.parametrize("squeezed", [False, True])
def test_the_tiles_that_are_met_are_those_in_which_anything_is_read(squeezed):
    length, num_keys = 160, 45 if squeezed else 160
    reads = intervals(length, length, window=50, segment_ids=jnp.asarray([[0] * 70 + [1] * 90]))
    if squeezed:
        reads = Intervals(*map(jnp.asarray, test_flash.squeezed(160, 4, 8, (0, 70))))
        reads = flash.clipped(reads, num_keys)
    x = jnp.zeros((1, length, 1, 16))
    b = tiles_gpu.cut(x, x[:, :num_keys], x[:, :num_keys], Tiles(32, 16, 4, 2))
    table = test_flash.table(reads, b.num_keys).reshape(5, 32, b.num_columns, 16)
    some, every = table.any((1, 3)), table.all((1, 3))
    kinds = tiles_gpu.keys_met, tiles_gpu.queries_met
    found = jax.jit(lambda reads: [met(b, reads).stacked()[0] for met in kinds])(reads)
    for axis, bounds in enumerate(map(np.asarray, found)):
        for tile, (begin, whole_begin, whole_end, end) in enumerate(bounds):
            at = np.arange(some.shape[1 - axis])
            assert not some.take(tile, axis)[(at < begin) | (at >= end)].any()
            assert every.take(tile, axis)[whole_begin:whole_end].all()
            assert begin <= whole_begin <= whole_end <= end
            assert end - begin <= some.take(tile, axis).sum() + 1
            if not squeezed:
                assert whole_end - whole_begin == every.take(tile, axis).sum()


def test_widths_are_made_up_of_powers_of_two_and_tiles_fit_in_memory():
    for width in range(1, 400):
        parts = tiles_gpu.parts(tiles_gpu.whole(width))
        sizes = [x.stop - x.start for x in parts]
        assert all(n & (n - 1) == 0 and n >= 16 for n in sizes)
        assert width <= sum(sizes) < width + 16 and parts[0].start == 0
        assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    most = tiles_gpu.shared_bytes()
    assert most == 217 * 1024  # of an H200, as none is here
    for width in (64, 256, 1024):
        tiles = Tiles(128, 128, 8, 2).fitted(2 * width, 8 * width)
        assert tiles.rows * 2 * width + tiles.columns * 8 * width <= most
        assert (tiles.rows == tiles.columns == 128) == (width == 64)


@pytest.fixture
def h200():
    """A device that need not exist, for which kernels are lowered, and taken by default."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def kernels_lowered(function, *shapes):
    """The names of the kernels that a function is lowered to for CUDA, of which Triton approves."""
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    names = []

    def visit(op):
        target = "call_target_name" in op.attributes and str(op.attributes["call_target_name"])
        if target and "triton" in target:
            config = op.attributes["mhlo.backend_config"]
            names.append(config["name"].value)
            if "ir" in config:  # of releases of jax that leave it to XLA to compile it
                approved(config["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return sorted(set(names))


def approved(code):
    """Reads a module of Triton's, which raises an error if anything in it does not fit."""
    from jaxlib.triton import dialect

    with ir.Context() as context:
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        assert ir.Module.parse(code).operation.verify()


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("length", [8192, 65536])
def test_the_branches_and_their_gradients_are_lowered_for_cuda_at_the_shape_of_the_paper(
    h200, length
):
    def loss(query, keys, values, gates):
        out = native_sparse_attention(query, keys, values, gates)
        return out.astype(jnp.float32).sum()

    counts = Branches(length // 16, length, length)
    keys, values = (Branches(*(shape(1, n, 4, width) for n in counts)) for width in (192, 128))
    given = shape(1, length, 64, 192), keys, values, shape(1, length, 64, 3)
    assert kernels_lowered(jax.grad(loss, (0, 1, 2, 3)), *given) == [
        "compressed_choice",
        "compressed_importance",
        "flash_attention_backward_keys",
        "flash_attention_backward_queries",
        "flash_attention_forward",
        "selected_backward_keys",
        "selected_backward_queries",
        "selected_backward_sums",
        "selected_forward",
    ]


def test_a_token_is_lowered_for_cuda_at_the_shape_of_the_paper(h200):
    keys, values = (
        Branches(*(shape(8, 4, n, width) for n in (4096, 65536, 65536))) for width in (192, 128)
    )
    given = shape(8, 1, 64, 192), keys, values, shape(8, 1, 64, 3), shape(8, 1, dtype="int32")
    decode = functools.partial(decode_gpu.decode_attention, config=NSAConfig())
    assert kernels_lowered(decode, *given) == ["decode_pieces"]


def test_flash_attention_in_float32_is_lowered_for_cuda(h200):
    loss = lambda *heads: flash_attention(*heads, window=100).sum()  # noqa: E731
    query, keys = (shape(2, 300, heads, 100, dtype="float32") for heads in (4, 2))
    given = query, keys, keys
    assert len(kernels_lowered(jax.grad(loss, (0, 1, 2)), *given)) == 3


def test_what_is_compiled_for_a_gpu_is_refused_elsewhere():
    x = jnp.zeros((1, 16, 1, 16))
    with pytest.raises(ValueError, match="'pallas_gpu' is compiled for a GPU, and this is a cpu"):
        flash_attention(x, x, x, implementation="pallas_gpu")
