"""NT-ASGD is algorithm 1: when averaging begins, what is averaged, and that runs go on with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ulmfit
from lineage_jax.sharding import MeshConfig, make_mesh
from lineage_jax.train import averaging, loop
from lineage_jax.train.averaging import AveragedSGDConfig
from lineage_jax.train.progress import Progress

PATIENCE = 2


def begins_at(losses, n):
    """Algorithm 1 of Merity et al. 2017: the first evaluation that begins to average, or None."""
    logs = []
    for t, v in enumerate(losses):
        if t > n and v > min(logs[: t - n]):
            return t
        logs.append(v)
    return None


def heard(losses, n):
    """The same, of ours; evaluation t follows step 10 (t + 1), with parameters of t."""
    average = averaging.begin({"w": jnp.zeros(2)}, n)
    hear = jax.jit(averaging.after_evaluation)
    for t, loss in enumerate(losses):
        params = {"w": jnp.full(2, t, jnp.float32)}
        average = hear(params, average, jnp.float32(loss), jnp.int32(10 * (t + 1)))
        if average.count > 0:
            np.testing.assert_array_equal(average.mean["w"], params["w"])  # T is averaged too
            return t
    return None


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_averaging_begins_when_algorithm_1_says(n, seed):
    rng = np.random.default_rng(seed)
    losses = np.float32(5 / np.arange(1, 31) + 0.1 * rng.random(30))
    assert heard(losses, n) == begins_at(losses, n)


def test_as_long_as_evaluations_improve_nothing_is_averaged():
    assert heard([5.0, 4.0, 3.0, 2.0, 1.0], 1) is None
    assert heard([5.0, 5.0, 5.0, 5.0], 1) is None  # no worse is not worse
    assert heard([1.0, 2.0, 3.0, 0.9], 5) is None  # too few to tell
    assert heard([5.0, 4.0, 4.5, 4.4], 1) == 3  # 4.5 is better than all but the last before it


def test_the_average_is_the_mean_of_all_parameters_since():
    average = averaging.begin({"w": jnp.zeros(())}, 1)
    params = [{"w": jnp.float32(x)} for x in (7.0, 1.0, 4.0, 6.0)]
    assert averaging.after_step(params[0], average).count == 0
    for step, loss in enumerate((1.0, 1.0, 2.0)):
        average = averaging.after_evaluation(params[1], average, jnp.float32(loss), jnp.int32(step))
        used = averaging.in_use(params[0], average)
        assert used["w"] == (7.0 if step < 2 else 1.0)
    for new in params[2:]:
        average = averaging.after_step(new, average)
    assert average.count == 3
    assert averaging.in_use(params[0], average)["w"] == pytest.approx((1 + 4 + 6) / 3)


def test_to_hear_of_an_evaluation_twice_changes_nothing():
    average = averaging.begin({"w": jnp.zeros(2)}, 1)
    for step, loss in enumerate((3.0, 2.0, 9.0)):
        told = {"w": jnp.full(2, step, jnp.float32)}, jnp.float32(loss), jnp.int32(step)
        average = averaging.after_evaluation(told[0], average, *told[1:])
        again = averaging.after_evaluation({"w": jnp.full(2, 50.0)}, average, *told[1:])
        jax.tree.map(np.testing.assert_array_equal, average, again)


def small(text, num_steps):
    """A run whose rate is too large to keep improving, so that averaging begins on the way."""
    made = ulmfit.tiny()
    return dataclasses.replace(
        made,
        model=dataclasses.replace(made.model, num_layers=1, embed_dim=8, hidden_dim=8, max_len=16),
        data=dataclasses.replace(
            made.data, path=str(text), heldout_fraction=0.2, seq_len=16, batch_size=4
        ),
        optimizer=AveragedSGDConfig(learning_rate=60.0, patience=1),
        train=loop.TrainConfig(
            num_steps=num_steps, eval_every=2, checkpoint_every=3, steps_per_call=1
        ),
    )


def train(experiment, folder, task=None):
    with Progress() as progress:
        return loop.train(
            task or experiment.task(),
            experiment.train,
            make_mesh(MeshConfig(data=1), jax.devices()[:1]),
            folder,
            experiment=experiment,
            progress=progress,
        )


def lines(folder):
    """Of metrics.jsonl, in an order that has nothing to do with when they were written."""
    return sorted((folder / "metrics.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The state after 24 steps that nothing interrupted, and the metrics of each."""
    folder = tmp_path_factory.mktemp("whole")
    return train(small(text, 24), folder), lines(folder)


@pytest.mark.slow
def test_a_run_averages_and_is_evaluated_by_the_average(whole):
    average = whole[0].state.extra["average"]
    assert 1 < int(average.count) < 24
    differs = jax.tree.map(lambda a, b: bool((a != b).any()), average.mean, whole[0].state.params)
    assert all(jax.tree.leaves(differs))


class KilledError(Exception):
    """What takes the place of a signal that leaves no time."""


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [13, 16])
def test_a_run_that_was_killed_and_goes_on_is_the_one_that_was_not(
    whole, text, tmp_path, killed_at
):
    experiment = small(text, 24)
    task = experiment.task()

    def until_killed(step, rows):
        if step == killed_at:
            raise KilledError
        return task.train_batch(step, rows)

    with pytest.raises(KilledError):
        train(experiment, tmp_path, dataclasses.replace(task, train_batch=until_killed))
    resumed = train(experiment, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole[0].state)
    assert lines(tmp_path) == whole[1]


@pytest.mark.slow
def test_a_run_that_was_saved_before_its_evaluation_hears_of_it_when_it_goes_on(
    whole, text, tmp_path, monkeypatch
):
    experiment = small(text, 24)
    evaluate = loop.evaluate
    asked = []

    def interrupted(eval_step, state, *rest):
        asked.append(int(state.step))
        return None if state.step == 12 else evaluate(eval_step, state, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop, "evaluate", interrupted)
        train(experiment, tmp_path)
    assert asked[-1] == 12
    resumed = train(experiment, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole[0].state)
    assert lines(tmp_path) == whole[1]
