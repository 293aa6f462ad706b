"""Who may read whom, against the definition written as a loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.nn import Mask, causal_mask, segment_mask


@pytest.mark.parametrize("window", [None, 1, 2, 3, 7])
def test_a_query_reads_itself_and_the_keys_before_it_within_its_window(window):
    queries, keys = jnp.asarray([[4, 5], [0, 2]]), jnp.arange(6)[None]
    mask = causal_mask(queries, keys, window)
    assert mask.shape == (2, 1, 2, 6)
    for b in range(2):
        for t, query in enumerate(queries[b].tolist()):
            first = 0 if window is None else max(0, query - window + 1)
            read = [key for key in range(6) if mask[b, 0, t, key]]
            assert read == list(range(first, query + 1))


def test_a_window_may_be_a_traced_number():
    index = jnp.arange(5)[None]
    given = causal_mask(index, index, jnp.asarray(2))
    np.testing.assert_array_equal(given, causal_mask(index, index, 2))


def test_documents_of_one_row_do_not_meet():
    segments = jnp.asarray([[1, 1, 2, 2, 0], [3, 9, 3, 3, 9]])
    mask = segment_mask(segments, segments)
    expected = np.asarray([[[a == b for b in row] for a in row] for row in segments.tolist()])
    np.testing.assert_array_equal(mask[:, 0], expected)


@pytest.mark.parametrize("window", [None, 2])
def test_a_mask_without_its_table_gives_the_table(window):
    index, segments = jnp.arange(5)[None], jnp.asarray([[1, 1, 2, 2, 2]])
    causal = Mask(index, index, segments, segments, window).dense()
    table = causal_mask(index, index, window) & segment_mask(segments, segments)
    np.testing.assert_array_equal(causal, table)
    both = Mask(index, index, segments, segments, window, causal=False).dense()
    np.testing.assert_array_equal(both, table | table.swapaxes(-1, -2))


def test_padding_is_read_by_nobody():
    index, kept = jnp.arange(4)[None], jnp.asarray([[True, False, True, True], [False] * 4])
    table = Mask(index, index, readable=kept).dense()
    expected = np.tril(np.ones((4, 4), bool)) & np.asarray(kept)[:, None]
    np.testing.assert_array_equal(table[:, 0], expected)
