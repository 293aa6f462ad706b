"""Flash attention is softmax(q k / sqrt(K)) v, in outputs, sums and gradients, at odd sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.kernels import blocks as blocks_module
from lineage_jax.kernels import flash_attention, flash_attention_backward


def reference(query, keys, values, visible):
    """In float64 on the host: heads one by one, the table of scores whole."""
    share = query.shape[2] // keys.shape[2]
    keys, values = (np.repeat(x, share, 2) for x in (keys, values))
    scores = np.einsum("bthk,bshk->bhts", query, keys) / math.sqrt(query.shape[-1])
    scores = np.where(visible, scores, -np.inf)
    log_sum = np.logaddexp.reduce(scores, -1)
    weights = np.exp(scores - log_sum[..., None])
    return np.einsum("bhts,bshk->bthk", weights, values), log_sum, weights


def gradients(query, keys, values, visible, grad):
    """What calculus says of it, written out."""
    _, _, weights = reference(query, keys, values, visible)
    groups, share = keys.shape[2], query.shape[2] // keys.shape[2]
    scale = 1 / math.sqrt(query.shape[-1])
    wide_keys, wide_values = (np.repeat(x, share, 2) for x in (keys, values))
    of_weights = np.einsum("bthk,bshk->bhts", grad, wide_values)
    inner = (weights * of_weights).sum(-1, keepdims=True)
    of_scores = weights * (of_weights - inner) * scale
    of_query = np.einsum("bhts,bshk->bthk", of_scores, wide_keys)
    of_keys = np.einsum("bhts,bthk->bshk", of_scores, query)
    of_values = np.einsum("bhts,bthk->bshk", weights, grad)

    def grouped(x):
        return x.reshape(*x.shape[:2], groups, share, x.shape[-1]).sum(3)

    return of_query, grouped(of_keys), grouped(of_values)


def visible_pairs(batch, length, causal, window, segments):
    at = np.arange(length)
    distance = at[:, None] - at[None]
    table = np.ones((batch, 1, length, length), bool)
    if causal:
        table &= distance >= 0
    if window is not None:
        table &= distance < window
    if segments is not None:
        table &= (segments[:, :, None] == segments[:, None, :])[:, None]
    return table


def distance(actual, expected):
    """Of two arrays, relative to the second's norm."""
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("length", "heads", "groups", "width", "causal", "window", "segmented", "dtype"),
    [
        (256, 2, 2, 16, True, None, False, "float32"),
        (130, 4, 2, 8, True, 37, True, "float32"),
        (300, 3, 1, 24, True, "traced", False, "float32"),  # three blocks, the last one padded
        (640, 2, 1, 8, True, None, True, "float32"),  # blocks of one document, and of others
        (640, 2, 1, 8, False, None, True, "float32"),
        (200, 2, 1, 8, False, None, True, "float32"),
        (384, 2, 1, 8, False, None, False, "float32"),
        (128, 2, 1, 192, True, None, True, "float32"),  # wider than a row of lanes, and uneven
        (300, 4, 2, 128, True, None, True, "float32"),  # columns of positions' heads
        (256, 2, 2, 128, True, 70, False, "float32"),
        (256, 2, 1, 64, True, None, True, "bfloat16"),
    ],
)
def test_outputs_sums_and_gradients_are_those_of_the_formula(
    monkeypatch, length, heads, groups, width, causal, window, segmented, dtype
):
    # Two blocks of queries to a chunk, where there are as many: sums over chunks are tried too.
    monkeypatch.setattr(blocks_module, "CHUNK_BYTES", 2 * 4 * 128 * width)
    rng, batch = np.random.default_rng(0), 2
    shapes = [(batch, length, n, width) for n in (heads, groups, groups, heads)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segments = np.sort(rng.integers(0, 4, (batch, length)), 1) if segmented else None
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)
    span = 50 if window == "traced" else window

    def both(query, keys, values, grad, window):
        options = dict(causal=causal, window=window, segment_ids=ids, interpret=True)
        out, log_sum = flash_attention(query, keys, values, **options)
        arrays = (query, keys, values, out, log_sum, grad)
        return out, log_sum, flash_attention_backward(*arrays, **options)

    if window == "traced":
        out, log_sum, grads = jax.jit(both)(*arrays, jnp.asarray(span))
    else:
        out, log_sum, grads = jax.jit(lambda *x: both(*x, window))(*arrays)
    exact = [np.asarray(x, np.float64) for x in arrays]
    table = visible_pairs(batch, length, causal, span, segments)
    expected, expected_log_sum, _ = reference(*exact[:3], table)
    tolerance = 1e-6 if dtype == "float32" else 5e-3  # bfloat16 rounds to 2^-9 of itself
    assert out.dtype == dtype
    assert distance(out, expected) < tolerance
    assert distance(log_sum, expected_log_sum) < tolerance
    for grad, like, of in zip(
        grads, arrays[:3], gradients(*exact[:3], table, exact[3]), strict=True
    ):
        assert grad.dtype == like.dtype
        assert distance(grad, of) < tolerance


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1024, 200])
@pytest.mark.parametrize("starts", [[[], [600]], [[256], [100, 130, 380, 900]]])
def test_blocks_that_no_query_reads_are_neither_fetched_nor_computed(causal, window, starts):
    documents = np.zeros((2, 1024), int)
    for row, places in enumerate(starts):
        for place in places:
            documents[row, place:] += 1
    blocks = blocks_module.Blocks(2, 1, 1, 1024, 8, 128, causal)
    spans = blocks_module.spans(jnp.asarray(documents), 128, jnp.asarray([window]))
    if not causal:
        window = None
    table = visible_pairs(2, 1024, causal, window, documents)[:, 0]
    tiles = table.reshape(2, 8, 128, 8, 128).swapaxes(2, 3)
    read = np.zeros((2, 8, 8), bool)
    for row, i, j in np.ndindex(read.shape):
        some, whole = blocks.visible(spans, row, i, j)
        read[row, i, j] = some
        assert bool(some & whole) == tiles[row, i, j].all()
        assert bool(some) >= tiles[row, i, j].any()  # a window and documents may hide in turn
        assert window == 200 or bool(some) == tiles[row, i, j].any()
    for row, i in np.ndindex(2, 8):
        first, last = blocks.keys_of(spans, row, i)
        assert list(range(first, last + 1)) == list(np.flatnonzero(read[row, i]))
        first, last = blocks.queries_of(spans, row, i)
        assert list(range(first, last + 1)) == list(np.flatnonzero(read[row, :, i]))


def test_the_blocks_of_one_document_are_counted():
    causal, full = (blocks_module.Blocks(1, 1, 1, 1024, 8, 128, causal) for causal in (True, False))
    assert (causal.pairs, causal.masked) == (36, 8 / 36)  # 8 x 9 / 2, of which the diagonal
    assert (full.pairs, full.masked) == (64, 0)


def test_a_window_without_causal_is_refused():
    x = jnp.zeros((1, 128, 1, 8))
    with pytest.raises(ValueError, match="window needs causal"):
        flash_attention(x, x, x, causal=False, window=3, interpret=True)
