"""Attention around a ring is attention, in outputs and gradients, however the sequence is cut."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lineage_jax import sharding
from lineage_jax.nn import Mask, dot_product_attention
from lineage_jax.nn.ring import Turns, ring_attention
from lineage_jax.sharding import MeshConfig
from tests.nn.closeness import assert_same

BATCH, WIDTH = 2, 3


def heads(length, num_heads, num_groups, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(BATCH, length, n, WIDTH) for n in (num_heads, num_groups, num_groups)]
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def mask_of(length, *, segments=False, window=None, causal=True):
    index = jnp.arange(length)[None]
    ids = None
    if segments:
        cuts = np.random.default_rng(0).integers(1, length, (BATCH, 2))
        ids = jnp.asarray((np.arange(length) >= cuts[:, :, None]).sum(1))
    return Mask(index, index, ids, ids, window, causal=causal)


def results(attention, arguments):
    def loss(*arguments):
        out = attention(*arguments)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arguments)


@pytest.mark.parametrize(
    ("ways", "length", "num_heads", "num_groups", "kind"),
    [
        (2, 12, 4, 4, {}),
        (4, 16, 4, 2, dict(segments=True)),
        (8, 32, 6, 2, dict(window=5, segments=True)),
        (3, 18, 4, 1, dict(window=jnp.asarray(7))),
        (3, 15, 2, 1, {}),  # five positions on each device: no halves to trade
        (4, 12, 4, 4, dict(causal=False)),
        (5, 10, 2, 2, dict(causal=False, segments=True, window=4)),
    ],
)
def test_outputs_and_gradients_are_those_of_attention_on_one_device(
    ways, length, num_heads, num_groups, kind
):
    arguments, mask = heads(length, num_heads, num_groups), mask_of(length, **kind)
    mesh = sharding.make_mesh(MeshConfig(data=1, context=ways), jax.devices()[:ways])
    expected = results(lambda *x: dot_product_attention(*x, mask.dense()), arguments)
    with sharding.use(mesh):
        actual = results(lambda *x: ring_attention(*x, mask, "context"), arguments)
    assert_same(actual, expected)


def test_half_precision_is_as_near_to_float32_as_on_one_device():
    exact, mask = heads(16, 4, 2), mask_of(16)
    halves = [x.astype(jnp.bfloat16) for x in exact]
    expected = dot_product_attention(*exact, mask.dense())
    with sharding.use(sharding.make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
        out = jax.jit(lambda *x: ring_attention(*x, mask, "context"))(*halves)
    assert out.dtype == jnp.bfloat16
    # Queries, keys, values, weights and the result are rounded to 2^-9 of themselves; values < 4.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=5 * 4 * 2**-9)


@pytest.mark.parametrize("ways", [2, 3, 4, 5, 8])
def test_every_device_computes_the_same_number_of_blocks_and_none_twice(ways):
    """Chunk a of the sequence reads chunks b <= a: each pair is met once, two to a turn."""
    turns = Turns("context", ways, 2, True)
    met = []
    for device in range(ways):
        mine = (device, 2 * ways - 1 - device)
        for turn in range(ways):
            of = (device - turn) % ways
            theirs = (of, 2 * ways - 1 - of)
            if turn == 0:
                pairs = turns.blocks(0)
            else:
                same = 0 if device >= turn else 1  # what `blocks` asks the device at run time
                pairs = [(1, 0), (same, same)]
            assert len(pairs) == (3 if turn == 0 else 2)
            met += [(mine[a], theirs[b]) for a, b in pairs]
    assert sorted(met) == [(a, b) for a in range(2 * ways) for b in range(a + 1)]


def test_no_device_ever_holds_more_scores_than_one_block():
    length, ways, num_heads = 64, 8, 2
    arguments, mask = heads(length, num_heads, num_heads), mask_of(length)
    mesh = sharding.make_mesh(MeshConfig(data=1, context=ways))
    where = NamedSharding(mesh, P(None, "context"))

    def loss(*x):
        return ring_attention(*x, mask, "context").sum()

    with sharding.use(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=where).lower(*arguments)
        text = compiled.compile().as_text()
    shapes = [map(int, shape.split(",")) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    share = length // ways
    # A block is of half a share of queries and half a share of keys.
    assert max(map(math.prod, shapes)) < BATCH * num_heads * share * share
    assert "all-gather" not in text
