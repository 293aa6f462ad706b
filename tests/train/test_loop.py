"""A run can be killed at any moment, and goes on as if it had not been."""

import dataclasses
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gpt
from lineage_jax.sharding import MeshConfig, make_mesh
from lineage_jax.train import loop
from lineage_jax.train.progress import Progress

SMALL = (  # noqa: SIM905
    "--model.num-layers 1 --model.embed-dim 16 --model.num-heads 2 --data.seq-len 32 "
    "--data.batch-size 8 --train.num-steps 60 --train.eval-every 30 --train.checkpoint-every 10"
).split()


def small(**train):
    experiment = gpt.tiny()
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, num_layers=1, embed_dim=16, num_heads=2),
        data=dataclasses.replace(experiment.data, seq_len=32, batch_size=8),
        train=loop.TrainConfig(
            **{"num_steps": 20, "eval_every": 10, "checkpoint_every": 5} | train
        ),
    )


def start(folder, environment):
    """`lineage train gpt` in a process of its own; it speaks to `folder.said`."""
    command = [sys.executable, "-m", "lineage_jax.cli", "train", "gpt", *SMALL]
    with open(f"{folder}.said", "w") as said:
        return subprocess.Popen(
            [*command, "--run-dir", str(folder), "--resume"],
            env=environment,
            stdout=said,
            stderr=said,
        )


def said(folder):
    return pathlib.Path(f"{folder}.said").read_text()


def losses(folder):
    """(step, loss) and (step, held-out loss) as metrics.jsonl has them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]


def steps_so_far(folder):
    try:
        return (folder / "metrics.jsonl").read_text().count("grad_norm")
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, process_environment):
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, process_environment).wait() == 0, said(folder)
    return folder


def test_a_run_writes_down_what_it_did(uninterrupted):
    assert [step for step, loss, _ in losses(uninterrupted) if loss] == list(range(1, 61))
    assert [step for step, _, loss in losses(uninterrupted) if loss] == [30, 60]
    status = json.loads((uninterrupted / "STATUS.json").read_text())
    assert status == {"status": "finished", "step": 60, "num_steps": 60}
    assert json.loads((uninterrupted / "config.json").read_text())["model"]["embed_dim"] == 16
    assert json.loads((uninterrupted / "env.json").read_text())["data"]["train"]["digest"]
    assert (uninterrupted / "samples" / "00000060.txt").read_text()


@pytest.mark.slow
def test_a_run_killed_twice_gives_the_same_losses_bit_for_bit(
    tmp_path, uninterrupted, process_environment
):
    moments = random.Random(0)
    for _ in range(2):
        process = start(tmp_path, process_environment)
        until = steps_so_far(tmp_path) + moments.randint(1, 25)
        while steps_so_far(tmp_path) < until and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert json.loads((tmp_path / "STATUS.json").read_text())["status"] == "running"
    assert start(tmp_path, process_environment).wait() == 0, said(tmp_path)
    assert "resumed from step" in said(tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_exits_75(tmp_path, uninterrupted, process_environment):
    process = start(tmp_path, process_environment)
    while steps_so_far(tmp_path) < 10 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    status = json.loads((tmp_path / "STATUS.json").read_text())
    assert status["status"] == "preempted"
    assert (tmp_path / "checkpoints" / "manifests" / f"{status['step']}.json").exists()
    assert start(tmp_path, process_environment).wait() == 0
    assert losses(tmp_path) == losses(uninterrupted)


@pytest.mark.slow
def test_a_finished_run_resumes_to_its_end_at_once(uninterrupted, process_environment):
    before = losses(uninterrupted)
    assert start(uninterrupted, process_environment).wait() == 0
    assert losses(uninterrupted) == before


def train(experiment, folder, **changes):
    task = dataclasses.replace(experiment.task(), **changes)
    with Progress() as progress:
        return loop.train(
            task,
            experiment.train,
            make_mesh(MeshConfig()),
            folder,
            experiment=experiment,
            progress=progress,
        )


@pytest.mark.slow
def test_training_lowers_the_held_out_loss(tmp_path):
    evaluation = train(small(), tmp_path).evaluation
    assert evaluation["loss"] < np.log(257)
    assert evaluation["bits_per_byte"] == pytest.approx(evaluation["loss"] / np.log(2))


@pytest.mark.slow
def test_steps_taken_several_a_call_are_the_steps_one_by_one(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    train(small(num_steps=8, steps_per_call=1), alone)
    train(small(num_steps=8, steps_per_call=3, log_every=7), together)  # 3 3 1 1, for 5 and 7
    of_each = [[loss for _, loss, _ in losses(folder) if loss] for folder in (alone, together)]
    assert len(of_each[0]) == 8
    np.testing.assert_allclose(*of_each, rtol=1e-5)


def test_steps_that_are_not_finite_are_skipped_and_then_stop_the_run(tmp_path):
    experiment = small(max_skipped=3)
    loss_fn = experiment.task().loss_fn

    def sick(params, extra, batch, rng):
        loss, rest = loss_fn(params, extra, batch, rng)
        return loss * jnp.where(batch["tokens"].sum() > 0, jnp.nan, 1.0), rest

    with pytest.raises(loop.DivergedError, match=r"3 steps in a row.*batches 0 to 2"):
        train(experiment, tmp_path, loss_fn=sick)
    assert json.loads((tmp_path / "STATUS.json").read_text())["status"] == "failed"


def test_a_run_directory_is_not_written_over(uninterrupted):
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["train"]["num_steps"] == 60
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        loop.check_run_dir(uninterrupted, small(), resume=False)


def test_resuming_with_another_model_names_what_differs(uninterrupted):
    other = small()
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, embed_dim=32))
    with pytest.raises(ValueError, match=r"model\.embed_dim was 16, now 32"):
        loop.check_run_dir(uninterrupted, other, resume=True)
    loop.check_run_dir(uninterrupted, small(num_steps=99), resume=True)  # may go on for longer
