"""What a classifier learns: labels, and the text beside them, against the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lineage_jax.objectives.labels import fine_tuning_loss, label_loss

ROWS, LENGTH, WORDS, LABELS = 5, 7, 11, 3


@pytest.fixture
def batch():
    """Rows of some length, of which the last is all padding."""
    rng = np.random.default_rng(0)
    sizes = np.array([7, 2, 4, 6, 0])
    arrays = {
        "logits": rng.standard_normal((ROWS, LABELS)).astype(np.float32),
        "label": rng.integers(0, LABELS, ROWS).astype(np.int32),
        "token_logits": rng.standard_normal((ROWS, LENGTH, WORDS)).astype(np.float32),
        "tokens": rng.integers(0, WORDS, (ROWS, LENGTH)).astype(np.int32),
        "mask": np.arange(LENGTH) < sizes[:, None],
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_loss_of_labels_is_their_mean_over_the_rows_that_count(batch):
    kept = batch["mask"].any(-1)
    loss, metrics = label_loss(batch["logits"], batch["label"], kept)
    by_row = [-log_softmax(x)[y] for x, y in zip(batch["logits"], batch["label"], strict=True)][:4]
    assert float(loss) == pytest.approx(np.mean(by_row), rel=1e-5)
    right = (batch["logits"].argmax(-1) == batch["label"])[:4].sum()
    assert tuple(map(float, metrics["accuracy"])) == (right, 4)
    assert float(metrics["loss"][0]) == pytest.approx(np.sum(by_row), rel=1e-5)


def test_the_text_is_learnt_beside_the_labels_by_its_weight(batch):
    labels, _ = label_loss(batch["logits"], batch["label"], batch["mask"].any(-1))
    lost = [
        -log_softmax(batch["token_logits"][row, t])[batch["tokens"][row, t + 1]]
        for row, size in enumerate(batch["mask"].sum(-1).tolist())
        for t in range(size - 1)
    ]
    for weight in (0.5, 2.0):
        loss, metrics = fine_tuning_loss(**batch, language_weight=weight)
        assert float(loss) == pytest.approx(float(labels) + weight * np.mean(lost), rel=1e-5)
        total, count = map(float, metrics["language_loss"])
        assert count == len(lost) and total == pytest.approx(np.sum(lost), rel=1e-5)


def test_without_its_weight_no_gradient_reaches_the_tokens(batch):
    def loss(token_logits, weight):
        given = {**batch, "token_logits": token_logits}
        return fine_tuning_loss(**given, language_weight=weight)[0]

    assert not jax.grad(loss)(batch["token_logits"], 0.0).any()
    gradient = np.asarray(jax.grad(loss)(batch["token_logits"], 0.5))
    both = np.array(batch["mask"])
    both[:, :-1] &= both[:, 1:].copy()  # where the next token is padding, nothing is learnt
    both[:, -1] = False
    np.testing.assert_array_equal(gradient.any(-1), both)
