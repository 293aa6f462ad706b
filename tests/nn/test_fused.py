"""The kernel of attention on a mesh: every device computes its rows and heads."""

import jax
import jax.numpy as jnp
import pytest

from lineage_jax import sharding
from lineage_jax.nn import Mask, dot_product_attention
from lineage_jax.nn.fused import ATTENDED, fused_attention
from lineage_jax.sharding import MeshConfig
from tests.nn.closeness import assert_same


def heads(length, num_heads, num_groups):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, n, 8) for n in (num_heads, num_groups, num_groups)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def mask_of(length, *, segments=False, window=None, causal=True):
    index = jnp.arange(length)[None]
    ids = jnp.asarray([[0] * 30 + [1] * (length - 30), [0] * length]) if segments else None
    return Mask(index, index, ids, ids, window, causal=causal)


def results(attention, arguments):
    def loss(*arguments):
        out = attention(*arguments)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arguments)


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        (None, dict(segments=True)),
        (MeshConfig(data=1, fsdp=2, tensor=2), dict(segments=True)),
        (MeshConfig(data=2, tensor=2), dict(window=jnp.asarray(20))),
        (MeshConfig(data=1, expert=2, tensor=2), dict(causal=False)),
    ],
)
def test_outputs_and_gradients_are_those_of_attention_on_one_device(mesh, kind):
    arguments, mask = heads(140, 4, 2), mask_of(140, **kind)
    expected = results(lambda *x: dot_product_attention(*x, mask.dense()), arguments)
    if mesh is None:
        actual = results(lambda *x: fused_attention(*x, mask), arguments)
    else:
        with sharding.use(sharding.make_mesh(mesh, jax.devices()[:4])):
            actual = results(lambda *x: fused_attention(*x, mask), arguments)
    assert_same(actual, expected)


def runs_again(policy):
    """Whether the backward pass of a recomputed block runs the forward kernel."""
    arguments, mask = heads(128, 2, 2), mask_of(128)
    block = jax.checkpoint(lambda *x: fused_attention(*x, mask).sum(), policy=policy)
    text = jax.jit(jax.grad(block, (0, 1, 2))).lower(*arguments).compile().as_text()
    forward = [line for line in text.splitlines() if "flash_attention_forward" in line]
    assert forward
    return any("rematted_computation" in line for line in forward)


def test_what_is_saved_by_name_spares_the_backward_pass_the_kernel():
    assert runs_again(jax.checkpoint_policies.nothing_saveable)
    assert not runs_again(jax.checkpoint_policies.save_only_these_names(ATTENDED))
