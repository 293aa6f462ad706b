"""The arms of the claims on sparse attention: keys are counted as they are read."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import language
from experiments.claims import blocks_and_back, needle, sparse_for_full
from experiments.study import keys_read, text
from experiments.study.long_rows import as_large, native_sparse_model
from lineage_jax.kernels import NSAConfig, select_blocks
from lineage_jax.kernels.native_sparse.config import compressed_reads, reach
from lineage_jax.models import llama, moba, native_sparse

LENGTH = 75
CONFIGS = [
    sparse_for_full.SPARSE,
    needle.SPARSE,
    NSAConfig(compressed_size=8, stride=4, block_size=12, num_blocks=3, num_local=2, window=10),
]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def positions(blocks, size):
    """How many positions of its blocks, up to itself, each query of one head reads."""
    at = np.arange(LENGTH)
    chosen = (np.asarray(blocks)[..., None] == at // size).any(-2)  # T S
    return (chosen & (at[None] <= at[:, None])).sum(-1)


@pytest.mark.parametrize("config", CONFIGS)
def test_as_many_keys_are_counted_as_the_three_branches_read(config):
    query, squeezed = normal(1, LENGTH, 2, 4), normal(1, config.num_compressed(LENGTH), 1, 4)
    blocks = select_blocks(query, squeezed, LENGTH, config=config)[0, :, 0]
    first, last = compressed_reads(reach(query), config)
    compressed = np.maximum(np.asarray(last - first) + 1, 0)[0]
    window = np.minimum(np.arange(LENGTH) + 1, config.window)
    counted = keys_read.three_branches(config, LENGTH)
    read = compressed + positions(blocks, config.block_size) + window
    np.testing.assert_array_equal(counted, read)


def test_as_many_keys_are_counted_as_a_mixture_of_blocks_reads():
    config = moba.selection(blocks_and_back.SPARSE)
    query, keys = normal(1, LENGTH, 1, 4), normal(1, LENGTH, 1, 4, seed=1)
    blocks = moba.chosen_blocks(query, keys, reach(query), None, config)[0, :, 0]
    counted = keys_read.selected(config.block_size, config.num_blocks, LENGTH)
    np.testing.assert_array_equal(counted, positions(blocks, config.block_size))


def test_what_is_read_of_everything_is_all():
    assert keys_read.share(keys_read.selected(16, 5, LENGTH)) == 1.0
    assert keys_read.share(keys_read.selected(16, 1, 32), slice(16, None)) == pytest.approx(
        sum(range(1, 17)) / sum(range(17, 33))
    )


@pytest.mark.parametrize("seq_len, width", [(1024, 32), (256, 64)])
def test_full_attention_has_as_many_parameters_as_the_branches(seq_len, width):
    sparse = native_sparse_model(needle.SPARSE, seq_len, compression_dim=4, width=width).config
    one = as_large(sparse)
    less = dataclasses.replace(one, mlp_dim=one.mlp_dim - 1)
    wanted = native_sparse.num_params(sparse)["total"]
    assert llama.num_params(less)["total"] < wanted <= llama.num_params(one)["total"]


@pytest.mark.parametrize("length", [needle.SHORT, needle.LONG])
def test_each_key_is_said_once_in_an_eighth_of_its_own_and_asked_for_once(length):
    batch = needle.with_facts(np.arange(5000) % 256, 1, 2, 6, length)
    part = (length - needle.NUM_KEYS) // needle.NUM_KEYS
    for tokens, values, depths in zip(*batch.values(), strict=True):
        told, asked = np.split(tokens, [length - needle.NUM_KEYS])
        assert sorted(asked) == list(range(needle.KEYS, needle.SAID))
        assert (told >= needle.KEYS).sum() == 2 * needle.NUM_KEYS
        for key, value, depth in zip(asked, values, depths, strict=True):
            (place,) = np.flatnonzero(told == key)
            assert place // part == depth
            said = told[place + 1] - needle.SAID
            assert said == needle.NUM_VALUES * (key - needle.KEYS) + value - needle.VALUES
            assert needle.VALUES <= value < needle.VOCAB_SIZE
        assert sorted(depths) == list(range(needle.NUM_KEYS))


def test_rows_of_another_seed_step_or_length_are_others():
    ids = np.arange(5000) % 256
    told = [(1, 2, 64), (2, 2, 64), (1, 3, 64), (1, 2, 256)]
    rows = [needle.with_facts(ids, seed, step, 3, length) for seed, step, length in told]
    for one, other in itertools.combinations(rows, 2):
        assert (one["values"] != other["values"]).any()
    again = needle.with_facts(ids, 1, 2, 3, 64)
    np.testing.assert_array_equal(again["tokens"], rows[0]["tokens"])


def test_no_key_is_read_outside_of_what_the_queries_that_ask_may():
    asking = slice(needle.LONG - needle.NUM_KEYS, None)
    keys = keys_read.three_branches(needle.SPARSE, needle.LONG)
    assert keys_read.share(keys, asking) <= 0.25
    keys = keys_read.three_branches(sparse_for_full.SPARSE, sparse_for_full.SEQ_LEN)
    assert keys_read.share(keys) <= 0.25


def test_a_mixture_of_all_blocks_is_full_attention():
    module = llama.Llama(blocks_and_back.FULL)
    params = nn.meta.unbox(jax.jit(lambda: language.init(module, jax.random.key(0)))())
    tokens = np.random.default_rng(0).integers(256, size=(1, 90))
    assert blocks_and_back.all_blocks_error(params, tokens) <= 1e-5


def test_updates_in_pieces_meet_every_batch_once_in_order(monkeypatch):
    met = []

    def steps(state, batches, rates):
        met.extend(zip(batches, rates, strict=True))
        count = len(rates)
        metrics = {"loss": (np.asarray(batches, float), np.full(count, 2.0))}
        return state + count, metrics | {"skipped": (np.zeros(count), np.ones(count))}

    monkeypatch.setattr(blocks_and_back, "programs", lambda recipe: (None, None, steps))
    rates = np.arange(100, dtype=np.float32)

    def stack(first, count):
        return list(range(first, first + count))

    recipe = text.recipe(llama.Llama(blocks_and_back.FULL))
    state, losses = blocks_and_back.updated(recipe, 0, range(90), stack=stack, rates=rates)
    state, more = blocks_and_back.updated(recipe, state, range(90, 100), stack=stack, rates=rates)
    assert state == 100
    assert met == [(i, float(i)) for i in range(100)]
    np.testing.assert_array_equal(np.concatenate([losses, more]), np.arange(100) / 2)
