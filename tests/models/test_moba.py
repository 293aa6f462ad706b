"""MoBA is LLaMA whose heads choose blocks: the choice, its limits, the past, documents, cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lineage_jax.models import llama, moba
from lineage_jax.models.moba import Moba, MobaConfig
from lineage_jax.nn import Mask, rotate
from tests.models.parity import assert_close as assert_parity

# Nothing divides the vocabulary, and no block ends where a row does.
TINY = MobaConfig(
    num_layers=3,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=37,
    vocab_size=67,
    max_len=24,
    block_size=4,
    top_k=2,
    full_layers=1,
)
LENGTH = 19


def parameters(config):
    """Every parameter random: ones would hide mistakes."""
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(Moba(config).init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        meta.unbox(shapes),
    )


@pytest.fixture(scope="module")
def params():
    return parameters(TINY)


@pytest.fixture(scope="module")
def tokens():
    """Three rows, in each of which no token is there twice."""
    rng = np.random.default_rng(1)
    return jnp.asarray([rng.permutation(67)[:LENGTH] for _ in range(3)], jnp.int32)


@jax.jit
def forward(params, tokens, positions=None, segment_ids=None, cache=None, mask=None):
    return Moba(TINY).apply({"params": params}, tokens, positions, segment_ids, cache, mask=mask)


@pytest.fixture(scope="module")
def full(params, tokens):
    return forward(params, tokens)[0]


def assert_close(found, expected):
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "changes", [dict(top_k=5, full_layers=0), dict(full_layers=3)], ids=["all blocks", "all layers"]
)
def test_what_reads_everything_is_a_llama_of_the_same_parameters(params, tokens, full, changes):
    names = [field.name for field in dataclasses.fields(llama.LlamaConfig)]
    parent = llama.LlamaConfig(**{name: getattr(TINY, name) for name in names})
    expected, _ = jax.jit(llama.Llama(parent).apply)({"params": params}, tokens)
    model = Moba(dataclasses.replace(TINY, **changes))
    assert_close(jax.jit(model.apply)({"params": params}, tokens)[0], expected)
    assert float(jnp.abs(full - expected).max()) > 1e-2
    assert moba.num_params(TINY) == llama.num_params(parent)


def test_each_head_reads_its_own_block_and_the_best_behind_it_and_last_layers_all(params, tokens):
    model = Moba(TINY)
    _, seen = jax.jit(lambda: model.apply({"params": params}, tokens, mutable=["intermediates"]))()
    weights = np.asarray(seen["intermediates"]["blocks"]["attention"]["weights"][0])  # L B H T S
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.triu(weights, 1), 0)
    t = np.arange(LENGTH)
    reads = np.broadcast_to(4 * np.minimum(t // 4, 1) + t % 4 + 1, (2, 3, 4, LENGTH))
    np.testing.assert_array_equal((weights[:2] > 0).sum(-1), reads)
    np.testing.assert_array_equal((weights[2] > 0).sum(-1), np.broadcast_to(t + 1, (3, 4, LENGTH)))
    # Heads that share keys choose for themselves.
    assert ((weights[:2, :, 0] > 0) != (weights[:2, :, 1] > 0)).any()


def test_no_position_sees_its_future(params, tokens):
    row = tokens[:1]

    @jax.jit
    @jax.jacrev
    def of_table(table):
        logits, _ = Moba(TINY).apply({"params": {**params, "embed": {"table": table}}}, row)
        return logits[0] @ jnp.sin(jnp.arange(67.0))

    seen = np.abs(of_table(params["embed"]["table"])[:, row[0]]).max(-1)  # T T
    np.testing.assert_array_equal(np.triu(seen, 1), 0)
    assert (seen[np.tril_indices(LENGTH)] > 0).all()  # the last layer reads all that is behind


@pytest.mark.parametrize("changed", range(0, LENGTH, 3))
def test_what_comes_later_moves_no_choice_before_it(params, tokens, full, changed):
    after, _ = forward(params, tokens.at[:, changed:].set((tokens[:, changed:] + 1) % 67))
    np.testing.assert_array_equal(full[:, :changed], after[:, :changed])
    assert (full[:, changed] != after[:, changed]).any(-1).all()


def test_a_sequence_is_scored_alike_wherever_it_begins(params, tokens, full):
    # Not as by full attention: mean keys turn with their positions, all of them alike.
    index = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    for first in (1, 4, 40):
        assert_close(forward(params, tokens, first + index)[0], full)


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


def test_cached_decoding_is_the_full_forward_pass_token_by_token(params, tokens, full):
    cache = moba.empty_cache(TINY, 3, LENGTH)
    for t in range(LENGTH):
        at = jnp.full((3, 1), t)
        logits, cache = forward(params, tokens[:, t : t + 1], at, None, cache)
        assert_close(logits[:, 0], full[:, t])


def test_prompts_of_unequal_length_go_on_each_at_its_own_position(params, tokens, full):
    lengths = jnp.asarray([2, 9, 5])
    real = jnp.arange(11)[None] < lengths[:, None]
    prompt = jnp.where(real, tokens[:, :11], 66)  # padded on the right with any id
    positions = jnp.broadcast_to(jnp.arange(11), prompt.shape)
    cache = moba.empty_cache(TINY, 3, LENGTH)
    logits, cache = forward(params, prompt, positions, None, cache, real)
    assert_close(logits[real], full[:, :11][real])
    for step in range(10):  # over the padding, and past the ends of blocks that it began
        at = lengths[:, None] + step
        following = jnp.take_along_axis(tokens, at, axis=1)
        logits, cache = forward(params, following, at, None, cache)
        assert_close(logits, jnp.take_along_axis(full, at[..., None], axis=1))


def by_hand(params, x, xp, choices):
    """Equations 2 to 6 of one layer, x [T, D]: with numpy it chooses, without it reads that."""
    rates = 10_000.0 ** -(np.arange(3) / 3)
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * rates[None, None])

    def turned(heads):
        pairs = (heads[..., :3] + 1j * heads[..., 3:]) * turn
        return xp.concatenate([pairs.real, pairs.imag], axis=-1)

    query, keys, values = (
        xp.einsum("td,dhk->thk", x, params[name]["kernel"]) for name in ("query", "key", "value")
    )
    query, keys = turned(query), turned(keys)
    out = 0.0
    for h in range(4):
        q, k, v = query[:, h], keys[:, h // 2], values[:, h // 2]
        reads = np.zeros((len(x), len(x)), bool)
        for t in range(len(x)):
            own = t // 4
            if xp is np:
                gates = {i: q[t] @ k[4 * i : 4 * i + 4].mean(0) for i in range(own)}
                best = sorted(gates, key=lambda i: -gates[i])[: TINY.top_k - 1]
                choices[t, h] = {own, *best}
            reads[t, [s for s in range(t + 1) if s // 4 in choices[t, h]]] = True
        weights = xp.where(reads, xp.exp(q @ k.T / 6**0.5), 0)
        weights = weights / weights.sum(-1, keepdims=True)
        out = out + weights @ v @ params["out"]["kernel"][h]
    return out


@pytest.mark.parity("moba", "a loop over section 2.2")
def test_a_layer_and_its_gradients_are_those_of_section_2_by_hand(params):
    rng, index = np.random.default_rng(3), jnp.arange(LENGTH)[None]
    x, cotangent = rng.standard_normal((2, LENGTH, 24))
    block = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["attention"])
    layer = moba.BlockAttention(
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        stddev=1.0,
        out_stddev=1.0,
        use_bias=False,
        place=functools.partial(rotate, base=10_000.0),
        blocks=moba.selection(TINY),
    )

    def ours(block, x):
        out, _ = layer.apply({"params": block}, x[None], Mask(index, index), index)
        return jnp.sum(out[0] * jnp.asarray(cotangent, jnp.float32)), out[0]

    given = jnp.asarray(x, jnp.float32)
    gradients, out = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(block, given)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (block, given))
    choices = {}
    assert_parity(out, by_hand(*exact, np, choices), 1e-5, "out")
    with jax.enable_x64(True):

        def loss(block, x):
            return jnp.sum(by_hand(block, x, jnp, choices) * cotangent)

        expected = jax.tree.map(np.asarray, jax.jit(jax.grad(loss, (0, 1)))(*exact))
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True)
    for found, theirs in pairs:
        assert_parity(found, theirs, 1e-5, "gradient", "gradients")


def test_an_8b_reads_a_twentieth_of_a_million_tokens():
    config = moba.moba_8b()
    assert config.max_len == 2**20 and config.num_layers - config.full_layers == 29
    assert 1 - config.top_k * config.block_size / config.max_len == pytest.approx(0.9531, abs=1e-4)
    assert moba.num_params(config) == llama.num_params(llama.llama3_1_8b())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(block_size=0), "block_size must be at least 1, got 0"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(full_layers=4), "full_layers must be in 0 ... num_layers=3, got 4"),
        (dict(full_layers=-1), "full_layers must be in 0 ... num_layers=3, got -1"),
        (dict(window=8), "wanted blocks alone, without a window, got window=8"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)
