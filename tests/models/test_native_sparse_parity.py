"""The model is the paper's formulas in float64, what is read listed by hand; gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.kernels import NSAConfig
from lineage_jax.models.native_sparse import NativeSparse, NativeSparseConfig
from tests.models.parity import assert_close
from tests.models.test_native_sparse import drawn

CONFIG = NativeSparseConfig(
    num_layers=2,
    embed_dim=10,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    value_dim=3,
    compression_dim=5,
    mlp_dim=11,
    vocab_size=23,
    max_len=32,
    rope_base=50.0,
    sparse=NSAConfig(
        compressed_size=4, stride=2, block_size=4, num_blocks=3, num_first=1, num_local=1, window=3
    ),
)
LENGTHS = (5, 22)  # of the documents of a row; the second begins within a stride and a block
FIRSTS = np.repeat([0, 5], LENGTHS)
BEGINS = range(0, sum(LENGTHS) - 3, 2)  # of the blocks that are squeezed


def normed(x, scale, xp):
    return x / xp.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_epsilon) * scale[None]


def silu(x, xp):
    return x / (1 + xp.exp(-x))


def turned(heads, places, xp):
    """Components i and i + K / 2 of [T, G, K] as a complex number, times e^(i position rate)."""
    half = heads.shape[-1] // 2
    rates = CONFIG.rope_base ** -(np.arange(half) / half)
    pairs = heads[..., :half] + 1j * heads[..., half:]
    pairs = pairs * np.exp(1j * places[:, None, None] * rates[None, None])
    return xp.concatenate([pairs.real, pairs.imag], axis=-1)


def squeezed(params, heads, xp):
    """Equation 7: of heads [T, G, K], one for each block."""
    blocks = xp.stack([heads[begin : begin + 4] for begin in BEGINS])  # C P G K
    blocks = blocks + params["positions"][None, :, None]
    inner = silu(xp.einsum("cpgk,pkf->cgf", blocks, params["up"]), xp)
    return xp.einsum("cgf,fk->cgk", inner, params["down"])


def average(query, keys, values, reads, xp):
    """Equation 1: [T, H, E] of values [S, G, E] where `reads` [T, G, S], and the weights."""
    query = query.reshape(len(query), 2, 3, -1)
    scores = xp.einsum("tgrk,sgk->tgrs", query, keys) / 2  # sqrt(K)
    weights = xp.where(reads[:, :, None], xp.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / xp.where(total > 0, total, 1)
    return xp.einsum("tgrs,sge->tgre", weights, values).reshape(len(query), 6, -1), weights


def table(size, reads):
    """[T, G, size], true at `reads(t, g)`."""
    told = np.zeros((sum(LENGTHS), 2, size), bool)
    for t, g in np.ndindex(told.shape[:2]):
        told[t, g, list(reads(t, g))] = True
    return told


def chosen(weights, t):
    """Equations 9 to 11: the blocks of 4 that a query reads, by the weights of a group [C]."""
    first, own = FIRSTS[t] // 4, t // 4
    worth = {block: 0.0 for block in range(first, own + 1)}
    for begin, weight in zip(BEGINS, weights, strict=True):
        for stride in (begin, begin + 2):
            if weight:
                worth[stride // 4] += weight
    worth[first] = worth[own] = np.inf
    return sorted(worth, key=lambda block: -worth[block])[:3]


def attended(params, x, choices, xp):
    """Equation 5 of x [T, D]; with numpy it chooses, and without it reads what was chosen."""
    heads = {
        name: xp.einsum("td,dgk->tgk", x, leaf["kernel"])
        for name, leaf in params.items()
        if name.endswith(("query", "key", "value", "gates"))
    }
    places = np.arange(len(x)) - FIRSTS
    query, selected, near = (
        turned(heads[name], places, xp) for name in ("query", "selected_key", "window_key")
    )
    key = squeezed(params["compress_keys"], heads["compressed_key"], xp)
    key = turned(key, places[np.asarray(BEGINS)], xp)
    value = squeezed(params["compress_values"], heads["compressed_value"], xp)

    behind = table(
        len(key),
        lambda t, g: [i for i, b in enumerate(BEGINS) if FIRSTS[t] <= b and b + 3 <= t],
    )
    compressed, weights = average(query, key, value, behind, xp)
    if xp is np:
        choices.update({(t, g): chosen(weights[t, g].sum(0), t) for t, g in np.ndindex(len(x), 2)})
    blocks = table(
        len(x), lambda t, g: [s for s in range(FIRSTS[t], t + 1) if s // 4 in choices[t, g]]
    )
    window = table(len(x), lambda t, g: range(max(FIRSTS[t], t - 2), t + 1))
    branches = (
        compressed,
        average(query, selected, heads["selected_value"], blocks, xp)[0],
        average(query, near, heads["window_value"], window, xp)[0],
    )
    gates = 1 / (1 + xp.exp(-heads["gates"] - params["gates"]["bias"][None]))
    out = sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
    return xp.einsum("the,hed->td", out, params["out"]["kernel"])


def by_hand(params, tokens, choices, xp):
    """Logits of one row."""
    x = params["embed"]["table"][tokens]
    for layer in range(CONFIG.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        given = normed(x, block["attention_norm"]["scale"], xp)
        x = x + attended(block["attention"], given, choices[layer], xp)
        given = normed(x, block["mlp_norm"]["scale"], xp)
        gate, up, down = (block["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        x = x + (silu(given @ gate, xp) * (given @ up)) @ down
    return normed(x, params["final_norm"]["scale"], xp) @ params["head"]["table"].T


@pytest.mark.parity("native_sparse", "a loop over section 3")
def test_logits_and_every_gradient_are_those_of_section_3_by_hand():
    model, rng = NativeSparse(CONFIG), np.random.default_rng(3)
    tokens = rng.integers(0, 23, sum(LENGTHS))
    ids = jnp.asarray(tokens, jnp.int32)[None]
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    segment_ids = jnp.asarray(np.repeat([1, 2], LENGTHS))[None]
    positions = jnp.asarray(np.arange(sum(LENGTHS)) - FIRSTS)[None]
    cotangent = rng.standard_normal((sum(LENGTHS), 23))

    @jax.jit
    def ours(params):
        logits, _ = model.apply({"params": params}, ids, positions, segment_ids)
        return jnp.sum(logits[0] * jnp.asarray(cotangent, jnp.float32)), logits[0]

    gradient, logits = jax.jit(jax.grad(ours, has_aux=True))(params)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    choices = [{}, {}]
    assert_close(logits, by_hand(exact, tokens, choices, np), 1e-5, "logits")
    # There is a choice where it says so: of the last query, groups and layers make several.
    assert len({tuple(made[26, g]) for made in choices for g in (0, 1)}) > 1
    with jax.enable_x64(True):

        def loss(params):
            return jnp.sum(by_hand(params, tokens, choices, jnp) * cotangent)

        expected = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(exact))
    for path, theirs in jax.tree_util.tree_leaves_with_path(expected):
        found = gradient
        for key in path:
            found = found[key.key]
        assert_close(found, theirs, 1e-4, jax.tree_util.keystr(path), "gradients")
