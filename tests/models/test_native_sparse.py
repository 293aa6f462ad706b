"""Native Sparse Attention reads what it is told to: blocks of the past, and what is near."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lineage_jax.kernels import NSAConfig
from lineage_jax.models import native_sparse
from lineage_jax.models.native_sparse import (
    NativeSparse,
    NativeSparseAttention,
    NativeSparseConfig,
)
from lineage_jax.nn import Attention, Mask, rotate

SPARSE = NSAConfig(
    compressed_size=4, stride=2, block_size=4, num_blocks=3, num_first=1, num_local=1, window=5
)
# No two widths alike; a tail that fills neither a block nor a stride.
TINY = NativeSparseConfig(
    num_layers=2,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    value_dim=5,
    compression_dim=7,
    mlp_dim=37,
    vocab_size=67,
    max_len=24,
    sparse=SPARSE,
)
LENGTH = 19


def drawn(shapes):
    """Every parameter random: zeros and ones would hide mistakes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        meta.unbox(shapes),
    )


@pytest.fixture(scope="module")
def params():
    ids = jnp.zeros((1, 1), jnp.int32)
    return drawn(jax.eval_shape(NativeSparse(TINY).init, jax.random.key(0), ids)["params"])


@pytest.fixture(scope="module")
def tokens():
    """Three rows, in each of which no token is there twice."""
    rng = np.random.default_rng(1)
    return jnp.asarray([rng.permutation(67)[:LENGTH] for _ in range(3)], jnp.int32)


@jax.jit
def forward(params, tokens, positions=None, segment_ids=None, cache=None, mask=None):
    return NativeSparse(TINY).apply(
        {"params": params}, tokens, positions, segment_ids, cache, mask=mask
    )


@pytest.fixture(scope="module")
def full(params, tokens):
    return forward(params, tokens)[0]


def assert_close(found, expected):
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)


def test_no_position_sees_its_future(params, tokens):
    row = tokens[:1]

    @jax.jit
    @jax.jacrev
    def of_table(table):
        logits, _ = NativeSparse(TINY).apply({"params": {**params, "embed": {"table": table}}}, row)
        return logits[0] @ jnp.sin(jnp.arange(67.0))

    seen = np.abs(of_table(params["embed"]["table"])[:, row[0]]).max(-1)  # T T
    np.testing.assert_array_equal(np.triu(seen, 1), 0)
    # The window of each of two layers reads the last five: all of the last nine are seen.
    near = np.tril(np.triu(np.ones_like(seen), -8)).astype(bool)
    assert (seen[near] > 0).all()


@pytest.mark.parametrize("changed", range(0, LENGTH, 3))
def test_what_comes_later_moves_no_choice_before_it(params, tokens, full, changed):
    after, _ = forward(params, tokens.at[:, changed:].set((tokens[:, changed:] + 1) % 67))
    np.testing.assert_array_equal(full[:, :changed], after[:, :changed])
    assert (full[:, changed] != after[:, changed]).any(-1).all()


def test_a_sequence_is_scored_alike_wherever_it_begins(params, tokens, full):
    index = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    for first in (1, 4, 40):
        assert_close(forward(params, tokens, first + index)[0], full)
    spread, _ = forward(params, tokens, 2 * index)
    assert float(jnp.abs(spread - full).max()) > 1e-2


def test_a_packed_document_whose_blocks_are_its_own_is_scored_as_if_it_were_alone(params, tokens):
    sizes = (8, 4, 7)
    segment_ids = jnp.asarray(np.repeat([7, 2, 5], sizes))[None]  # any ids, in any order
    positions = jnp.concatenate([jnp.arange(size) for size in sizes])[None]
    packed, _ = forward(params, tokens[:1], positions, segment_ids)
    first = 0
    for size in sizes:
        alone = tokens[:1].at[:, :size].set(tokens[:1, first : first + size])
        assert_close(packed[:, first : first + size], forward(params, alone)[0][:, :size])
        first += size


def test_documents_that_share_a_block_do_not_meet(params, tokens):
    segment_ids = jnp.asarray(np.repeat([1, 2, 3], (6, 5, 8)))[None].repeat(3, 0)
    before, _ = forward(params, tokens, None, segment_ids)
    other = tokens.at[:, 6:11].set((tokens[:, 6:11] + 1) % 67)
    after, _ = forward(params, other, None, segment_ids)
    kept = jnp.asarray(segment_ids != 2)
    np.testing.assert_array_equal(before[kept], after[kept])
    assert (before[~kept] != after[~kept]).any(-1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_not_read(params, tokens, side):
    index = np.arange(LENGTH)
    mask = index >= 4 if side == "left" else index < 15  # a block, which moves no other
    mask = jnp.broadcast_to(jnp.asarray(mask), tokens.shape)
    found, _ = forward(params, tokens, mask=mask)
    alone, _ = forward(params, jnp.roll(tokens, -4, axis=1) if side == "left" else tokens)
    assert_close(found[mask].reshape(3, 15, -1), alone[:, :15])


def test_cached_decoding_is_the_full_forward_pass_token_by_token(params, tokens, full):
    cache = native_sparse.empty_cache(TINY, 3, LENGTH)
    for t in range(LENGTH):
        at = jnp.full((3, 1), t)
        logits, cache = forward(params, tokens[:, t : t + 1], at, None, cache)
        assert_close(logits[:, 0], full[:, t])


def test_a_prompt_may_be_read_in_pieces(params, tokens, full):
    cache, begin = native_sparse.empty_cache(TINY, 3, LENGTH), 0
    for size in (6, 6, 1, 6):
        at = jnp.broadcast_to(begin + jnp.arange(size), (3, size))
        logits, cache = forward(params, tokens[:, begin : begin + size], at, None, cache)
        assert_close(logits, full[:, begin : begin + size])
        begin += size


def test_prompts_of_unequal_length_go_on_each_at_its_own_position(params, tokens, full):
    lengths = jnp.asarray([2, 9, 5])
    real = jnp.arange(11)[None] < lengths[:, None]
    prompt = jnp.where(real, tokens[:, :11], 66)  # padded on the right with any id
    positions = jnp.broadcast_to(jnp.arange(11), prompt.shape)
    cache = native_sparse.empty_cache(TINY, 3, LENGTH)
    logits, cache = forward(params, prompt, positions, None, cache, real)
    assert_close(logits[real], full[:, :11][real])
    for step in range(10):  # over the padding, and far enough to compress what was pending
        at = lengths[:, None] + step
        following = jnp.take_along_axis(tokens, at, axis=1)
        logits, cache = forward(params, following, at, None, cache)
        assert_close(logits, jnp.take_along_axis(full, at[..., None], axis=1))


WIDTH = 24
EQUAL = dict(num_heads=4, num_kv_heads=2, head_dim=6, stddev=1.0, out_stddev=1.0)
PLACE = functools.partial(rotate, base=100.0)


@functools.cache
def attention(**changes):
    """The layer alone, to be called with parameters and what it needs besides; and these.

    It gives its output and its weights.
    """
    config = dataclasses.replace(SPARSE, **changes)
    layer = NativeSparseAttention(**EQUAL, value_dim=6, hidden_dim=7, sparse=config, place=PLACE)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, LENGTH, WIDTH)), jnp.float32)
    index = jnp.arange(LENGTH)[None]
    inputs = x, Mask(index, index), index
    params = drawn(jax.eval_shape(layer.init, jax.random.key(0), *inputs)["params"])

    @jax.jit
    def call(params, *inputs):
        (out, _), seen = layer.apply({"params": params}, *inputs, mutable=["intermediates"])
        return out, seen["intermediates"]["weights"][0]

    return call, params, inputs


def opening(params, branch):
    """Parameters whose gates are 1 for that branch and 0 for the others, to a hundred digits."""
    kernel, bias = params["gates"]["kernel"], params["gates"]["bias"]
    bias = jnp.full_like(bias, -300).at[:, branch].set(300)
    return {**params, "gates": {"kernel": 0 * kernel, "bias": bias}}


@pytest.mark.parametrize("branch", ["selected", "window"])
def test_what_reads_everything_is_full_attention_of_its_own_heads(branch):
    call, params, inputs = attention(num_blocks=5, window=LENGTH)
    params = opening(params, ["compressed", "selected", "window"].index(branch))
    found, weights = call(params, *inputs)
    theirs = {"query": params["query"], "out": params["out"]}
    theirs |= {name: params[f"{branch}_{name}"] for name in ("key", "value")}
    full = Attention(**EQUAL, use_bias=False, place=PLACE)
    (expected, _), seen = full.apply({"params": theirs}, *inputs, mutable=["intermediates"])
    assert_close(found, expected)
    assert_close(weights, seen["intermediates"]["weights"][0])


@pytest.mark.parametrize("branch", [0, 1, 2], ids=["compressed", "selected", "window"])
def test_each_branch_reads_as_many_positions_as_it_is_told(branch):
    call, params, inputs = attention()
    weights = np.asarray(call(opening(params, branch), *inputs)[1])  # B H T S
    t = np.arange(LENGTH)
    squeezed = np.maximum(0, (t - 3) // 2 + 1)  # blocks of 4, one in 2 positions, all of it behind
    reads = [
        np.where(squeezed > 0, 2 * squeezed + 2, 0),
        4 * np.minimum(t // 4, 2) + t % 4 + 1,  # two whole blocks, and its own up to itself
        np.minimum(t + 1, 5),
    ][branch]
    np.testing.assert_array_equal((weights > 0).sum(-1), np.broadcast_to(reads, (2, 4, LENGTH)))
    np.testing.assert_array_equal(np.triu(weights, 1), 0)
    expected = np.broadcast_to(reads > 0, weights.shape[:-1])
    np.testing.assert_allclose(weights.sum(-1), expected, rtol=0, atol=1e-6)
    if branch == 1:  # the heads of a group choose together, and groups for themselves
        chosen = (weights > 0).reshape(2, 2, 2, LENGTH, LENGTH)
        np.testing.assert_array_equal(chosen[:, :, 0], chosen[:, :, 1])
        assert (chosen[:, 0] != chosen[:, 1]).any()


def test_a_gate_of_each_head_weighs_each_branch():
    call, params, inputs = attention()
    closed = jnp.full_like(params["gates"]["bias"], -300)

    def attended(*opened):
        bias = closed.at[tuple(zip(*opened, strict=True))].set(300) if opened else closed
        gates = {"kernel": 0 * params["gates"]["kernel"], "bias": bias}
        return call({**params, "gates": gates}, *inputs)[0]

    np.testing.assert_array_equal(attended(), 0)
    pair = [(0, 1), (3, 2)]
    assert_close(attended(*pair), attended(pair[0]) + attended(pair[1]))


def test_parameters_are_as_many_as_the_papers_formulas_say():
    c = TINY
    heads = 24 * (4 * 6 + 3 * 2 * (6 + 5) + 4 * 3) + 4 * 3 + 4 * 5 * 24
    squeezes = 4 * 6 + 4 * 6 * 7 + 7 * 6 + 4 * 5 + 4 * 5 * 7 + 7 * 5
    block = heads + squeezes + 3 * 24 * 37 + 2 * 24
    found = native_sparse.num_params(c)
    assert found == {"total": 2 * 67 * 24 + 2 * block + 24, "non_embedding": 2 * block + 24}
    large = native_sparse.num_params(native_sparse.nsa_dense())["total"]
    assert round(large / 1e9, 1) == 5.1
    assert round((large + 66 * 30 * 3 * 2560 * 1408) / 1e9, 1) == 26.5  # with all experts


def test_the_cache_holds_the_raw_the_compressed_and_what_is_pending():
    cache = jax.eval_shape(lambda: native_sparse.empty_cache(TINY, 3, LENGTH))
    # 19 positions, and the 20th of the last block
    assert [x.shape for x in cache.keys] == [(2, 3, 2, n, 6) for n in (10, 20, 20)]
    assert [x.shape for x in cache.values] == [(2, 3, 2, n, 5) for n in (10, 20, 20)]
    assert cache.pending_keys.shape == (2, 3, 4, 2, 6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(window=8), "wanted the window in sparse.window, and no other, got window=8"),
        (dict(value_dim=0), "value_dim must be at least 1, got 0"),
        (dict(compression_dim=0), "compression_dim must be at least 1, got 0"),
        (dict(head_dim=7), "head_dim must be even, as pairs turn, got 7"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


@pytest.mark.parametrize("wrong", [dict(causal=False), dict(window=3)])
def test_a_mask_that_the_branches_cannot_follow_is_refused(wrong):
    call, params, (x, mask, index) = attention()
    with pytest.raises(ValueError, match="wanted a causal mask without a window"):
        call(params, x, dataclasses.replace(mask, **wrong), index)


def test_a_cache_without_positions_or_with_packed_documents_is_refused(params, tokens):
    cache, index = native_sparse.empty_cache(TINY, 3, LENGTH), jnp.zeros_like(tokens)
    for positions, segment_ids in ((None, None), (index, index)):
        with pytest.raises(ValueError, match="a cache needs the positions to write to"):
            forward(params, tokens, positions, segment_ids, cache)
