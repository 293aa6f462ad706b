"""AR and TAR are what the released AWD-LSTM computes, for tokens that count, within documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.objectives.activation import activation_penalty, slowness_penalty

ROWS, LENGTH, WIDTH = 3, 6, 4
HIDDEN = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH))
ONE = jnp.ones((ROWS, LENGTH), jnp.int32)
ALL = jnp.ones((ROWS, LENGTH), bool)


def test_where_all_tokens_count_they_are_the_means_of_the_released_code():
    x = np.asarray(HIDDEN, np.float64)
    assert float(activation_penalty(HIDDEN, ALL)) == pytest.approx(np.square(x).mean(), rel=1e-6)
    of_pairs = np.square(x[:, 1:] - x[:, :-1]).mean()
    found = float(slowness_penalty(HIDDEN, ONE, ALL))
    assert found == pytest.approx(of_pairs * (LENGTH - 1) / LENGTH, rel=1e-6)


def test_tokens_that_do_not_count_have_no_share():
    mask = ALL.at[0, 2:].set(False)
    others = HIDDEN.at[0, 2:].add(100.0)
    assert activation_penalty(HIDDEN, mask) == activation_penalty(others, mask)
    assert slowness_penalty(HIDDEN, ONE, mask) == slowness_penalty(others, ONE, mask)


def test_from_one_document_to_the_next_there_is_no_change():
    segments = ONE.at[:, 3:].set(2)
    apart = HIDDEN.at[:, 3:].add(100.0)
    penalties = [float(slowness_penalty(x, segments, ALL)) for x in (HIDDEN, apart)]
    np.testing.assert_allclose(*penalties, rtol=1e-4)
    assert slowness_penalty(apart, ONE, ALL) > 100 * penalties[0]


def test_a_batch_is_the_mean_of_its_rows_by_the_tokens_that_count():
    mask = jnp.arange(LENGTH)[None] < jnp.asarray([6, 1, 3])[:, None]
    segments = ONE.at[:, 2:].set(2)
    share = mask.sum(1) / mask.sum()
    for penalty in (
        lambda row: activation_penalty(HIDDEN[row], mask[row]),
        lambda row: slowness_penalty(HIDDEN[row], segments[row], mask[row]),
    ):
        parts = [share[row] * penalty(slice(row, row + 1)) for row in range(ROWS)]
        np.testing.assert_allclose(sum(parts), penalty(slice(None)), rtol=1e-6)


def test_nothing_that_counts_costs_nothing():
    none = jnp.zeros((ROWS, LENGTH), bool)
    assert activation_penalty(HIDDEN, none) == slowness_penalty(HIDDEN, ONE, none) == 0
