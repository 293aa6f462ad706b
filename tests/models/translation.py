"""What every encoder-decoder keeps: decoding is the whole; padding and the future are unseen."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tests.nn.closeness import assert_same
from tests.parity_table import record

SOURCE_VOCAB, VOCAB = 23, 19
SOURCE_LENGTHS, LENGTHS = np.asarray([7, 1, 4, 6]), np.asarray([5, 6, 1, 3])
BATCH, SOURCE_LENGTH, LENGTH = 4, 7, 6

SOURCE = jnp.asarray(np.random.default_rng(1).integers(0, SOURCE_VOCAB, (4, 7)), jnp.int32)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, (4, 6)), jnp.int32)
SOURCE_MASK = jnp.asarray(np.arange(SOURCE_LENGTH) < SOURCE_LENGTHS[:, None])
MASK = jnp.asarray(np.arange(LENGTH) < LENGTHS[:, None])
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))


@functools.cache
def params_of(module: nn.Module) -> Any:
    """Every parameter random, biases and those that start at zero too."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), SOURCE, TOKENS)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32),
        nn.unbox(shapes),
    )


@functools.partial(jax.jit, static_argnums=0)
def call(module, params, source, tokens, source_mask=None, mask=None):
    return module.apply({"params": params}, source, tokens, source_mask, mask)


@functools.partial(jax.jit, static_argnums=0)
def start(module, params, source, source_mask=None):
    return module.apply({"params": params}, source, source_mask, LENGTH, method="start")


@functools.partial(jax.jit, static_argnums=0)
def decode(module, params, tokens, positions, cache, mask=None):
    return module.apply({"params": params}, tokens, positions, cache, mask, method="decode")


@functools.partial(jax.jit, static_argnums=0)
def alignments(module, params, source, tokens, source_mask=None, mask=None):
    """The weights [B, T, S] that the module sows."""
    inputs = (source, tokens, source_mask, mask)
    _, sown = module.apply({"params": params}, *inputs, mutable="intermediates")
    (weights,) = sown["intermediates"]["alignment"]
    return weights


def check_decoding_token_by_token(module: nn.Module) -> None:
    """Each token's logits are those of the whole translation, from pieces of any length."""
    params = params_of(module)
    whole = call(module, params, SOURCE, TOKENS, SOURCE_MASK)
    for pieces in ([1] * LENGTH, [2, 3, 1]):
        cache, at = start(module, params, SOURCE, SOURCE_MASK), 0
        for size in pieces:
            here = slice(at, at + size)
            logits, cache = decode(module, params, TOKENS[:, here], POSITIONS[:, here], cache)
            assert_same(logits, whole[:, here])
            at += size


def check_prompts_of_unequal_length(module: nn.Module) -> None:
    """Prompts padded on the right go on, each from its last real token."""
    params = params_of(module)
    whole = call(module, params, SOURCE, TOKENS, SOURCE_MASK)
    lengths = jnp.asarray([4, 1, 3, 2])
    prompt, mask = TOKENS[:, :4], jnp.arange(4)[None] < lengths[:, None]
    cache = start(module, params, SOURCE, SOURCE_MASK)
    logits, cache = decode(module, params, prompt, POSITIONS[:, :4], cache, mask)
    assert_same(logits[mask], whole[:, :4][mask])
    for t in range(2):
        at = (lengths + t)[:, None]
        following = jnp.take_along_axis(TOKENS, at, axis=1)
        logits, cache = decode(module, params, following, at, cache)
        assert_same(logits, jnp.take_along_axis(whole, at[..., None], axis=1))


def check_rows_are_as_they_are_alone(module: nn.Module) -> None:
    """Outputs and gradients of padded rows are those of each row by itself, without a mask."""
    params = params_of(module)
    rows = (1, 3)  # of 1 and 6 source words, and 6 and 3 target words
    projection = jnp.zeros((BATCH, LENGTH, VOCAB))
    for row in rows:
        projection = projection.at[row].set(jax.random.normal(jax.random.key(row), (LENGTH, VOCAB)))

    def together(params):
        logits = module.apply({"params": params}, SOURCE, TOKENS, SOURCE_MASK, MASK)
        return jnp.sum(jnp.where(MASK[..., None], projection * logits, 0.0)), logits

    def alone(params, row):
        source, tokens = SOURCE[row, : SOURCE_LENGTHS[row]], TOKENS[row, : LENGTHS[row]]
        logits = module.apply({"params": params}, source[None], tokens[None])
        return jnp.sum(projection[row, : LENGTHS[row]] * logits[0]), logits[0]

    gradient, logits = jax.jit(jax.grad(together, has_aux=True))(params)
    run = jax.jit(jax.grad(alone, has_aux=True), static_argnums=1)
    total = jax.tree.map(jnp.zeros_like, params)
    for row in rows:
        one, expected = run(params, row)
        total = jax.tree.map(jnp.add, total, one)
        assert_same(logits[row, : LENGTHS[row]], expected)
    assert_gradients(gradient, total)


def assert_gradients(ours: Any, expected: Any) -> None:
    """Leaf by leaf within 1e-4 of the largest entry, none of them zero.

    But for the bias of keys, which moves no softmax: its gradient is rounding.
    """
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        where, largest = jax.tree_util.keystr(path), np.abs(other).max()
        if "['key']['bias']" in where:
            continue
        assert largest > 0, where
        error = np.abs(one - other).max() / largest
        record("gradients", error)
        assert error <= 1e-4, where


def check_ids_of_padding_are_not_seen(module: nn.Module) -> None:
    """Other ids where there is padding change no bit of what is real."""
    params = params_of(module)
    source = jnp.where(SOURCE_MASK, SOURCE, (SOURCE + 1) % SOURCE_VOCAB)
    tokens = jnp.where(MASK, TOKENS, (TOKENS + 1) % VOCAB)
    before = call(module, params, SOURCE, TOKENS, SOURCE_MASK, MASK)
    after = call(module, params, source, tokens, SOURCE_MASK, MASK)
    np.testing.assert_array_equal(before[MASK], after[MASK])


def check_source_padded_on_the_left_is_that_on_the_right(module: nn.Module) -> None:
    """Where the padding of the source stands does not matter."""
    params = params_of(module)
    source = jnp.stack([jnp.roll(SOURCE[i], 7 - SOURCE_LENGTHS[i]) for i in range(BATCH)])
    right = call(module, params, SOURCE, TOKENS, SOURCE_MASK)
    left = call(module, params, source, TOKENS, SOURCE_MASK[:, ::-1])
    assert_same(left, right)


def check_no_token_sees_its_future(module: nn.Module) -> None:
    """A changed target token changes its own logits and none before."""
    params = params_of(module)
    before = call(module, params, SOURCE, TOKENS, SOURCE_MASK)
    for changed in range(LENGTH):
        tokens = TOKENS.at[:, changed].set((TOKENS[:, changed] + 1) % VOCAB)
        after = call(module, params, SOURCE, tokens, SOURCE_MASK)
        np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
        assert (before[:, changed] != after[:, changed]).any(-1).all()


def check_every_real_source_token_is_seen(module: nn.Module) -> None:
    """A changed source token changes the logits of all target tokens."""
    params = params_of(module)
    before = call(module, params, SOURCE[:1], TOKENS[:1])
    for changed in range(SOURCE_LENGTH):
        source = SOURCE[:1].at[:, changed].set((SOURCE[0, changed] + 1) % SOURCE_VOCAB)
        after = call(module, params, source, TOKENS[:1])
        assert (before != after).any(-1).all()


def check_half_precision_gives_float32_logits_near_those_of_float32(module, half) -> None:
    """Logits of bfloat16 activations are float32, and off by roundings alone."""
    params = params_of(module)
    logits = call(half, params, SOURCE, TOKENS, SOURCE_MASK, MASK)
    assert logits.dtype == jnp.float32
    expected = call(module, params, SOURCE, TOKENS, SOURCE_MASK, MASK)[MASK]
    # 13 steps on end, each of which rounds its weights and its outputs to 2^-9 of themselves.
    error = jnp.sqrt(jnp.mean((logits[MASK] - expected) ** 2) / jnp.mean(expected**2))
    assert error < 13 * 2**-8
