"""The step: gradients, clipping, the guard, accumulation and what is carried, on one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lineage_jax.train.optim import scale_by_given_learning_rate
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import make_train_step, many_steps

SGD = scale_by_given_learning_rate()


def loss_fn(params, extra, batch, rng):
    """Mean squared error over the rows that count, and how many batches were seen."""
    error = jnp.square(batch["x"] @ params["w"] - batch["y"]).sum(-1)
    kept = batch["mask"].astype(jnp.float32)
    total, count = (error * kept).sum(), kept.sum()
    extra = {**extra, "seen": extra["seen"] + 1}
    return total / jnp.maximum(count, 1.0), (extra, {"loss": (total, count)})


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "x": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
        "mask": jnp.asarray([1, 1, 1, 0, 1, 0, 0, 0], bool),  # 3, 1, 0 of quarters' 2: unequal
    }


def new_state(tx=SGD, dtype=jnp.float32):
    w = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), dtype)
    return TrainState.create({"w": w}, tx, seed=4, extra={"seen": jnp.zeros((), jnp.int32)})


def gradient(state, batch):
    """By hand, in float64."""
    x, y, w = (np.asarray(v, np.float64) for v in (batch["x"], batch["y"], state.params["w"]))
    kept = np.asarray(batch["mask"], np.float64)[:, None]
    return 2 * x.T @ (kept * (x @ w - y)) / kept.sum()


def moved(before, after):
    return np.asarray(before.params["w"], np.float64) - np.asarray(after.params["w"], np.float64)


def test_a_step_goes_down_the_gradient_and_reports_sums_and_counts(batch):
    state = new_state()
    after, metrics = jax.jit(make_train_step(loss_fn, SGD))(state, batch, 0.1)
    expected = gradient(state, batch)
    np.testing.assert_allclose(moved(state, after), 0.1 * expected, rtol=1e-4, atol=1e-6)
    _, (_, sums) = loss_fn(state.params, state.extra, batch, None)
    np.testing.assert_allclose(metrics["loss"], sums["loss"], rtol=1e-6)
    assert float(metrics["loss"][1]) == 4
    assert float(metrics["grad_norm"][0]) == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    assert tuple(map(float, metrics["skipped"])) == (0, 1)
    assert int(after.step) == 1 and int(after.seed) == 4 and int(after.skipped) == 0


@pytest.mark.parametrize("limit", [1e-3, 0.5, 1e6])
def test_gradients_are_scaled_down_to_the_limit_and_never_up(batch, limit):
    state = new_state()
    after, metrics = make_train_step(loss_fn, SGD, max_grad_norm=limit)(state, batch, 1.0)
    expected = gradient(state, batch)
    norm = np.linalg.norm(expected)
    scaled = expected * min(1.0, limit / norm)
    np.testing.assert_allclose(moved(state, after), scaled, rtol=1e-4, atol=1e-6)
    assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-5)  # before it is scaled


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])  # 1e30: finite, its square is not
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(batch, poison, accumulate):
    tx = optax.chain(optax.scale_by_adam(), SGD)

    def after(params, extra):
        return {"seen": extra["seen"], "sum": params["w"].sum()}

    extra = {"seen": jnp.zeros((), jnp.int32), "sum": jnp.zeros(())}
    before = new_state(tx).replace(extra=extra)

    def with_sum(params, extra, batch, rng):
        loss, (new, metrics) = loss_fn(params, extra, batch, rng)
        return loss, ({**new, "sum": extra["sum"]}, metrics)

    step = jax.jit(
        make_train_step(with_sum, tx, accumulate=accumulate, max_grad_norm=1.0, after=after)
    )
    bad = {**batch, "x": batch["x"].at[0, 0].set(poison)}
    state = before
    for skipped in (1, 2):
        state, metrics = step(state, bad, 0.1)
        assert int(state.step) == skipped == int(state.skipped)
        for part in ("params", "opt_state", "extra"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))
        assert tuple(map(float, metrics["skipped"])) == (1, 1)
        assert tuple(map(float, metrics["loss"])) == (0, 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics))
    state, metrics = step(state, batch, 0.1)
    assert int(state.skipped) == 0 and int(state.step) == 3
    assert tuple(map(float, metrics["skipped"])) == (0, 1)
    assert np.abs(moved(before, state)).min() > 0


def test_after_sees_the_new_parameters(batch):
    state = new_state()

    def after(params, extra):
        return {**extra, "copy": params["w"]}

    state = state.replace(extra={**state.extra, "copy": jnp.zeros((3, 2))})
    new, _ = make_train_step(loss_fn, SGD, after=after)(state, batch, 0.1)
    np.testing.assert_array_equal(new.extra["copy"], new.params["w"])
    assert int(new.extra["seen"]) == 1


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_count_by_their_tokens_and_carry_extra(batch, accumulate):
    state = new_state()
    whole, expected = make_train_step(loss_fn, SGD)(state, batch, 0.1)
    parts, metrics = make_train_step(loss_fn, SGD, accumulate=accumulate)(state, batch, 0.1)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    assert int(parts.extra["seen"]) == accumulate


def test_micro_batches_of_bfloat16_parameters_add_up(batch):
    state = new_state(dtype=jnp.bfloat16)
    low = {**batch, "x": batch["x"].astype(jnp.bfloat16), "y": batch["y"].astype(jnp.bfloat16)}
    after, _ = make_train_step(loss_fn, SGD, accumulate=4)(state, low, 0.1)
    assert after.params["w"].dtype == jnp.bfloat16
    # Parameters in [1, 4) stand 2^-7 or 2^-6 apart: the move is rounded to the nearest of them.
    expected = 0.1 * gradient(state, low)
    np.testing.assert_allclose(moved(state, after), expected, rtol=0, atol=2**-7)


def test_random_numbers_follow_from_seed_and_step_and_differ_by_micro_batch(batch):
    def noise(params, extra, batch, rng):
        drawn = jax.random.normal(rng)
        return (params["w"] * 0).sum() + drawn, (extra, {"loss": (drawn, jnp.ones(()))})

    step = make_train_step(noise, SGD)
    one, first = step(new_state(), batch, 0.0)
    _, second = step(one, batch, 0.0)
    _, again = step(new_state(), batch, 0.0)
    _, other = step(new_state().replace(seed=jnp.asarray(5, jnp.int32)), batch, 0.0)
    drawn = [float(metrics["loss"][0]) for metrics in (first, second, again, other)]
    assert drawn[0] == drawn[2] and len(set(drawn)) == 3

    def squares(params, extra, batch, rng):  # equal draws would have no variance
        drawn = jax.random.normal(rng)
        metrics = {"loss": (drawn, jnp.ones(())), "square": (drawn**2, jnp.ones(()))}
        return (params["w"] * 0).sum(), (extra, metrics)

    _, metrics = make_train_step(squares, SGD, accumulate=4)(new_state(), batch, 0.0)
    mean, square = (float(metrics[name][0]) / 4 for name in ("loss", "square"))
    assert square - mean**2 > 0.01


def test_a_batch_that_keeps_nothing_moves_nothing(batch):
    state = new_state()
    empty = {**batch, "mask": jnp.zeros(8, bool)}
    for accumulate in (1, 4):
        after, metrics = make_train_step(loss_fn, SGD, accumulate=accumulate)(state, empty, 0.1)
        np.testing.assert_array_equal(after.params["w"], state.params["w"])
        assert tuple(map(float, metrics["loss"])) == (0, 0)


def test_many_steps_are_the_steps_one_by_one(batch):
    tx = optax.chain(optax.scale_by_adam(), SGD)
    step = make_train_step(loss_fn, tx)
    batches = [{**batch, "x": batch["x"] * scale} for scale in (1.0, np.nan, 0.5)]
    rates = jnp.asarray([0.1, 0.2, 0.05])
    one, metrics = new_state(tx), []
    for rows, rate in zip(batches, rates, strict=True):
        one, found = jax.jit(step)(one, rows, rate)
        metrics.append(found)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    many, found = jax.jit(many_steps(step))(new_state(tx), stack, rates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), many, one)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    assert found["skipped"][0].tolist() == [0, 1, 0]
