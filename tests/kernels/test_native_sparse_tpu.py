"""The kernels for TPU, interpreted, are the reference; and the real compiler takes them."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse import (
    compressed_tpu,
    reference,
    selected_backward_tpu,
    selected_blocks_tpu,
    selected_tpu,
)
from lineage_jax.kernels.native_sparse.compressed_tpu import compressed_forward
from lineage_jax.kernels.native_sparse.config import Branches, NSAConfig, reach
from lineage_jax.kernels.native_sparse.decode import empty_nsa_cache, nsa_decode
from lineage_jax.kernels.native_sparse.packed_tpu import packed
from lineage_jax.kernels.native_sparse.selected_backward_tpu import selected_backward
from lineage_jax.kernels.native_sparse.selected_tpu import selected_forward
from lineage_jax.pods.aot import in_a_process
from lineage_jax.pods.bundles import calls, on_chip
from lineage_jax.pods.topologies import Topology

USUAL = NSAConfig(
    compressed_size=8, stride=4, block_size=16, num_blocks=3, num_first=1, num_local=1
)
ODD = NSAConfig(compressed_size=5, stride=5, block_size=5, num_blocks=5, num_first=2, num_local=3)
BROAD = NSAConfig(
    compressed_size=8, stride=8, block_size=32, num_blocks=3, num_first=1, num_local=1
)
LONG = NSAConfig(compressed_size=4, stride=2, block_size=4, num_blocks=7, num_first=0, num_local=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    batch: int = 1
    positions: int = 45
    queries: int | None = None
    heads: int = 4
    groups: int = 2
    width: int = 12
    value_width: int = 10
    segmented: bool = False
    dtype: str = "float32"
    config: NSAConfig = USUAL

    @property
    def offset(self):
        return self.positions - (self.queries or self.positions)

    def normal(self, rng, length, heads, width):
        return jnp.asarray(rng.normal(size=(self.batch, length, heads, width)), self.dtype)

    def arrays(self, length):
        """Queries, so many keys and values, a gradient of what is attended, and the reach."""
        rng, queries = np.random.default_rng(0), self.queries or self.positions
        query = self.normal(rng, queries, self.heads, self.width)
        keys = self.normal(rng, length, self.groups, self.width)
        values = self.normal(rng, length, self.groups, self.value_width)
        grad = self.normal(rng, queries, self.heads, self.value_width)
        ids = None
        if self.segmented:
            ids = jnp.asarray(
                np.sort(rng.integers(0, 3, (self.batch, self.positions)), 1), jnp.int32
            )
        return (query, keys, values, grad), reach(query, ids, self.offset)

    def blocks(self):
        """Any blocks, as many as there may be or fewer, those of the future and of others too."""
        rng = np.random.default_rng(1)
        most, count = self.config.num_selectable(self.positions), self.config.num_blocks
        blocks = np.full((self.batch, self.queries or self.positions, self.groups, count), -1)
        for at in np.ndindex(blocks.shape[:3]):
            some = rng.integers(0, min(most, count) + 1)
            blocks[at][:some] = np.sort(rng.choice(most, some, replace=False))
        return jnp.asarray(blocks, jnp.int32)


def distance(actual, expected):
    """Of two arrays, relative to the second's norm."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def exact(arrays):
    """In float32, which holds what bfloat16 does."""
    return [x.astype(jnp.float32) for x in arrays]


SELECTED = {
    "groups of two": (Case(batch=2), True),
    "documents, heads of their own": (Case(positions=150, heads=2, segmented=True), True),
    "later queries of three heads": (Case(positions=70, queries=33, heads=6, config=ODD), True),
    "sixteen heads in bfloat16": (Case(heads=16, groups=1, width=24, dtype="bfloat16"), True),
    "a few columns after a row of lanes": (
        Case(positions=90, heads=2, groups=1, width=136, config=BROAD),
        True,
    ),
    "a key in the gaps of three": (
        Case(positions=90, heads=2, groups=1, width=88, value_width=72, config=BROAD),
        True,
    ),
    "packed keys are fetched": (Case(positions=45, heads=3, groups=1), False),
    "many blocks in parts": (Case(config=LONG, heads=1, groups=1), True),
    "parts are fetched": (Case(config=LONG, heads=1, groups=1), False),
}


@pytest.mark.parametrize(("case", "resident"), SELECTED.values(), ids=SELECTED)
def test_the_selected_branch_and_its_gradients_are_those_of_the_reference(
    monkeypatch, case, resident
):
    if not resident:
        monkeypatch.setattr(selected_blocks_tpu, "SPARE_BYTES", 2**40)
    if case.batch == 1:  # as many queries at once as on a TPU take long to compile
        for module in (selected_tpu, selected_backward_tpu):
            monkeypatch.setattr(module, "SCORED", 2)
            monkeypatch.setattr(module, "ATTENDED", 2)
    if case.config is LONG:
        monkeypatch.setattr(selected_blocks_tpu, "TOGETHER", 8)
        monkeypatch.setattr(selected_blocks_tpu, "matrix_width", lambda: 128)
    arrays, reads = case.arrays(case.positions)
    blocks, config = case.blocks(), case.config

    @jax.jit
    def ours(query, keys, values, grad):
        given = query, keys, values, blocks
        out, log_sum = selected_forward(*given, config, reads, interpret=True)
        grads = selected_backward(*given, out, log_sum, grad, config, reads, interpret=True)
        return out, log_sum, grads

    @jax.jit
    def theirs(query, keys, values, grad):
        attend = functools.partial(
            reference.selected_attention, blocks=blocks, config=config, reach=reads
        )
        out, pull = jax.vjp(attend, query, keys, values)
        return out, pull(grad)

    out, log_sum, grads = ours(*arrays)
    expected, expected_grads = theirs(*exact(arrays))
    tolerances = (1e-6, 1e-5) if case.dtype == "float32" else (5e-3, 2e-2)
    assert out.dtype == arrays[0].dtype
    assert distance(out, expected) < tolerances[0]
    assert np.isfinite(log_sum).all()
    for grad, like, of in zip(grads, arrays, expected_grads, strict=False):
        assert grad.dtype == like.dtype
        assert distance(grad, of) < tolerances[1]


@pytest.mark.parametrize(
    ("width", "across", "parts", "rows"),
    [(192, 256, 4, 96), (192, 128, 2, 96), (64, 128, 2, 32), (320, 256, 2, 160), (24, 256, 2, 32)],
)
def test_packed_keys_meet_queries_and_add_up_as_they_are(width, across, parts, rows):
    keys, other = packed((width, 128), (across, 128), 64, "bfloat16")
    assert (keys.parts, keys.rows, other.parts, other.rows) == (parts, rows, 1, 64)
    rng = np.random.default_rng(0)
    heads = jnp.asarray(rng.normal(size=(3, width)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(3, 128)), jnp.float32)
    given = jnp.asarray(rng.normal(size=(1, 130, 1, width)), jnp.float32)
    blocks = list(keys.stored(given)[0, 0])
    assert len(blocks) == 4  # one of zeros
    slot, key = keys.order(2)
    expected = np.asarray(given)[0, np.asarray([64, 0])[slot] + key, 0]
    met = keys.scores(keys.laid(heads), [blocks[1], blocks[0]])
    assert distance(met, heads @ expected.T) < 1e-6
    added = keys.whole(keys.sums(weights, [blocks[1], blocks[0]]))
    assert distance(added, weights @ expected) < 1e-6


COMPRESSED = {
    "documents": (Case(batch=2, positions=150, segmented=True), True),
    "later queries of three heads": (Case(positions=70, queries=33, heads=6, config=ODD), True),
    "sixteen heads in bfloat16": (
        Case(positions=140, heads=16, groups=1, width=24, dtype="bfloat16"),
        True,
    ),
    "nothing is forced, heads of their own": (Case(positions=90, heads=2, config=LONG), True),
    "weights computed again": (Case(positions=150, segmented=True), False),
}


@pytest.mark.parametrize(("case", "kept"), COMPRESSED.values(), ids=COMPRESSED)
def test_the_compressed_branch_and_its_choice_are_those_of_the_reference(monkeypatch, case, kept):
    monkeypatch.setattr(compressed_tpu, "CHUNK", 16)  # several chunks
    if not kept:
        monkeypatch.setattr(compressed_tpu, "SPARE_BYTES", 2**40)
    length, config = case.positions, case.config
    arrays, reads = case.arrays(config.num_compressed(length))

    @jax.jit
    def ours(query, keys, values):
        return compressed_forward(query, keys, values, length, config, reads, interpret=True)

    @jax.jit
    def theirs(query, keys, values):
        return reference.compressed_attention(query, keys, values, length, config, reads)

    out, log_sum, blocks = ours(*arrays[:3])
    expected, expected_blocks = theirs(*exact(arrays[:3]))
    assert out.dtype == arrays[0].dtype
    assert distance(out, expected) < (1e-6 if case.dtype == "float32" else 5e-3)
    assert np.isfinite(log_sum).all()
    np.testing.assert_array_equal(blocks, expected_blocks)


def test_log_sums_are_those_of_the_scores():
    case = Case()
    (query, keys, values, _), reads = case.arrays(case.positions)
    all_ = jnp.broadcast_to(jnp.arange(3)[None, None, None], (1, case.positions, case.groups, 3))
    _, log_sum = selected_forward(query, keys, values, all_, case.config, reads, interpret=True)
    scores = jnp.einsum("bthk,bshk->bhts", query, jnp.repeat(keys, 2, 2)) / np.sqrt(case.width)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    expected = jax.nn.logsumexp(jnp.where(causal, scores, -jnp.inf), axis=-1)
    np.testing.assert_allclose(log_sum, expected, rtol=1e-5, atol=1e-5)


CONFIG = NSAConfig()


def compressed(query, keys, values, reads, length):
    return compressed_forward(query, keys, values, length, CONFIG, reads)


def selected(query, keys, values, blocks, reads):
    return selected_forward(query, keys, values, blocks, CONFIG, reads)


def selected_gradients(query, keys, values, blocks, out, log_sum, grad, reads):
    return selected_backward(query, keys, values, blocks, out, log_sum, grad, CONFIG, reads)


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def decode(query, keys, values, gates, cache, positions):
    """Ten tokens, one after another."""

    def token(i, state):
        cache, out = state
        squeeze = (lambda pieces: pieces.mean(-2),) * 2
        given = query + out, keys, values, gates, cache, positions + i
        return nsa_decode(*given, squeeze, config=CONFIG)[::-1]

    return jax.lax.fori_loop(0, 10, token, (cache, jnp.zeros_like(query)))


def temporaries(function, given, topology, donate):
    """Bytes, in a process for the TPU compiler."""
    compiled = on_chip(function, given, topology, "lower", donate).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_kernels_state_what_they_compute():
    """Of a thousand positions, whose queries read half of the compressed keys."""
    heads = shape(1, 1024, 64, 192), shape(1, 1024, 4, 192), shape(1, 1024, 4, 128)
    squeezed = (heads[0], *(shape(1, 64, *x.shape[2:]) for x in heads[1:]))
    blocks, out = shape(1, 1024, 4, 16, dtype="int32"), shape(1, 1024, 64, 128)
    reads = Intervals(*(shape(1, 1024, dtype="int32"),) * 2)
    sums = shape(1, 64, 1024, dtype="float32")

    def all_kernels(heads, squeezed, blocks, out, sums, reads):
        compressed(*squeezed, reads, 1024)
        selected(*heads, blocks, reads)
        selected_gradients(*heads, blocks, out, sums, out, reads)

    jaxpr = jax.make_jaxpr(all_kernels)(heads, squeezed, blocks, out, sums, reads).jaxpr
    stated = {call.params["name"]: call.params["cost_estimate"] for call in calls(jaxpr)}
    read = 64 * 1024 * 1024  # scores, of 16 blocks of 64 keys
    assert {name: cost.flops for name, cost in stated.items()} == {
        "compressed_forward": 2 * 64 * 1024 * 64 // 2 * (192 + 128),
        "selected_forward": 2 * read * (192 + 128),
        "selected_backward_queries": 2 * read * (2 * 192 + 128),
        "selected_backward_keys": 2 * read * (2 * 192 + 2 * 128),
    }
    assert stated["selected_forward"].transcendentals == read


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'lineage-jax[tpu]' (no TPU needed)",
)
def test_a_token_is_written_and_its_blocks_are_read_where_they_are():
    cache = jax.eval_shape(lambda: empty_nsa_cache(2, 8192, 4, 128, 128, "bfloat16", CONFIG))
    branches = Branches(*[shape(2, 1, 4, 128)] * 3)
    gates, positions = shape(2, 1, 64, 3), shape(2, 1, dtype="int32")
    given = shape(2, 1, 64, 128), branches, branches, gates, cache, positions
    topology = Topology.parse("v5e:1x1")
    work = functools.partial(temporaries, decode, given, topology, (4,))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert in_a_process(topology.chip.flags, work) < held / 10
