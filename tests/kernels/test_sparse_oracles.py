"""Sparse attention against what others wrote in torch: fla's naive NSA, and MoBA by its formula."""

import importlib.util
import math
import pathlib
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.kernels import NSAConfig, compressed_attention, select_blocks, selected_attention
from lineage_jax.models import moba

pytestmark = pytest.mark.oracle

ROWS, LENGTH, WIDTH, VALUE_WIDTH = 2, 43, 12, 10
IMPLEMENTATIONS = ("reference", "xla")
SIZES = {
    "many-blocks": (
        NSAConfig(compressed_size=4, stride=4, block_size=4, num_blocks=5, window=1),
        dict(heads=4, groups=2),
    ),
    "a-wide-group": (
        NSAConfig(compressed_size=8, stride=8, block_size=8, num_blocks=3, window=1),
        dict(heads=16, groups=1),
    ),
    "more-than-there-are": (
        NSAConfig(compressed_size=16, stride=16, block_size=16, num_blocks=4, window=1),
        dict(heads=3, groups=3),
    ),
}
sizes = pytest.mark.parametrize("config, heads", SIZES.values(), ids=SIZES)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture
def fla(monkeypatch):
    """fla's file of plain torch, without the package around it, which imports triton."""
    pytest.importorskip("torch")
    pytest.importorskip("einops")
    found = importlib.util.find_spec("fla")
    if found is None:
        pytest.skip("fla-core is not installed")
    # What it takes from the package serves rows of unequal length, which are not asked for here.
    for name in ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.pooling"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fla.ops.utils"].prepare_chunk_offsets = None
    sys.modules["fla.ops.utils.pooling"].mean_pooling = None
    (folder,) = found.submodule_search_locations
    path = pathlib.Path(folder, "ops", "nsa", "naive.py")
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Flash Attention is not installed", ImportWarning)
        spec.loader.exec_module(module)
    return module


def drawn(heads, groups, keys=LENGTH, seed=0):
    """Queries, keys, values, and a gradient of what is read, in float32."""
    rng = np.random.default_rng(seed)
    shapes = (
        (LENGTH, heads, WIDTH),
        (keys, groups, WIDTH),
        (keys, groups, VALUE_WIDTH),
        (LENGTH, heads, VALUE_WIDTH),
    )
    return [rng.normal(size=(ROWS, *shape)).astype(np.float32) for shape in shapes]


def ours(function, *arrays):
    """What a function of the first arrays gives, and its gradients for the last."""
    *inputs, out_grad = arrays
    out, pull = jax.vjp(function, *map(jnp.asarray, inputs))
    return [np.asarray(x) for x in (out, *jax.jit(pull)(jnp.asarray(out_grad)))]


def in_torch(function, *arrays, dtype="float32"):
    """The same of a function of tensors."""
    import torch

    *inputs, out_grad = (torch.tensor(x, dtype=getattr(torch, dtype)) for x in arrays)
    for x in inputs:
        x.requires_grad_()
    out = function(*inputs)
    out.backward(out_grad)
    return [x.detach().numpy() for x in (out, *(x.grad for x in inputs))]


def assert_equal(found, wanted):
    """Outputs, then the gradients of queries, keys and values, each by its norm."""
    for one, other in zip(found, wanted, strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


@implementations
@sizes
def test_the_selected_branch_is_fla_s_with_its_gradients(fla, config, heads, implementation):
    import torch

    query, *rest = drawn(**heads)
    squeezed = jnp.asarray(drawn(**heads, keys=config.num_compressed(LENGTH), seed=1)[1])
    blocks = select_blocks(jnp.asarray(query), squeezed, LENGTH, config=config)

    def read(*arrays):
        told = dict(config=config, implementation=implementation)
        return selected_attention(*arrays, blocks, **told)

    def naive(*tensors):
        chosen = torch.tensor(np.asarray(blocks), dtype=torch.long)
        return fla.naive_nsa_selection(*tensors, chosen, block_size=config.block_size)

    assert_equal(ours(read, query, *rest), in_torch(naive, query, *rest))


@implementations
@sizes
def test_the_compressed_branch_is_fla_s_with_its_gradients(fla, config, heads, implementation):
    arrays = drawn(**heads, keys=config.num_compressed(LENGTH))

    def read(*arrays):
        told = dict(config=config, implementation=implementation)
        return compressed_attention(*arrays, LENGTH, **told)[0]

    def naive(*tensors):
        scale = 1 / math.sqrt(WIDTH)
        return fla.naive_nsa_compression(*tensors, config.block_size, scale)[0]

    assert_equal(ours(read, *arrays), in_torch(naive, *arrays))


@implementations
@sizes
def test_fla_selects_the_same_blocks(fla, config, heads, implementation):
    import torch

    query, squeezed, *_ = drawn(**heads, keys=config.num_compressed(LENGTH))
    told = dict(config=config, implementation=implementation)
    blocks = select_blocks(jnp.asarray(query), jnp.asarray(squeezed), LENGTH, **told)
    tensors = torch.tensor(query), torch.tensor(squeezed)
    sizes = config.num_blocks, config.block_size, 1 / math.sqrt(WIDTH)
    theirs = fla.naive_nsa_topk(*tensors, *sizes).numpy()
    np.testing.assert_array_equal(np.sort(blocks), np.sort(theirs))


def mixture_of_blocks(query, keys, values, *, size, top_k):
    """MoBA by its formula (Lu et al. 2025, section 2.2, equations 2 to 6), a query at a time.

    The query's own block counts as one of the k, and is read up to the query.
    """
    import torch

    rows, length, num_heads, _ = query.shape
    out = []
    for b, t, h in np.ndindex(rows, length, num_heads):
        g = h // (num_heads // keys.shape[2])
        own, scores = t // size, {}
        for block in range(own):
            mean = keys[b, block * size : (block + 1) * size, g].mean(0)
            scores[block] = float(query[b, t, h].detach() @ mean.detach())
        best = sorted(scores, key=scores.get, reverse=True)[: top_k - 1]
        at = [s for s in range(t + 1) if s // size in (*best, own)]
        weights = torch.softmax(keys[b, at, g] @ query[b, t, h] / math.sqrt(WIDTH), 0)
        out.append(weights @ values[b, at, g])
    return torch.stack(out).reshape(rows, length, num_heads, -1)


@pytest.mark.parametrize(
    "size, top_k, heads, groups", [(4, 3, 4, 2), (8, 2, 3, 3), (5, 1, 2, 1), (16, 9, 4, 4)]
)
def test_a_mixture_of_blocks_is_its_formula_with_its_gradients(size, top_k, heads, groups):
    pytest.importorskip("torch")
    fields = dict(num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=2, mlp_dim=8)
    config = moba.MobaConfig(**fields, vocab_size=9, max_len=LENGTH, block_size=size, top_k=top_k)
    arrays = drawn(heads, groups)

    def read(*arrays):
        return moba.block_attention(*arrays, None, 0, moba.selection(config))

    def formula(*tensors):
        return mixture_of_blocks(*tensors, size=size, top_k=top_k)

    assert_equal(ours(read, *arrays), in_torch(formula, *arrays, dtype="float64"))
