"""The loop around the step: what it writes down, what it refuses, where it goes on."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import gpt
from lineage_jax.sharding import MeshConfig, make_mesh
from lineage_jax.train import loop, memory
from lineage_jax.train.metrics import config_json, write_json
from lineage_jax.train.progress import Progress
from lineage_jax.train.runs import read_status


def small(text, **train):
    experiment = gpt.tiny()
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, num_layers=1, embed_dim=16, num_heads=2),
        data=dataclasses.replace(
            experiment.data, path=str(text), heldout_fraction=0.2, seq_len=32, batch_size=8
        ),
        optimizer=dataclasses.replace(experiment.optimizer, warmup_steps=1),
        train=loop.TrainConfig(**{"num_steps": 8, "eval_every": 4, "checkpoint_every": 5} | train),
    )


def losses(folder):
    """(step, loss) and (step, held-out loss) as metrics.jsonl has them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]


def train(experiment, folder):
    task = experiment.task()
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
def test_a_run_writes_down_what_it_did_and_has_learned(tmp_path, text):
    experiment = small(text)
    evaluation = train(experiment, tmp_path).evaluation
    assert [step for step, loss, _ in losses(tmp_path) if loss] == list(range(1, 9))
    assert [step for step, _, loss in losses(tmp_path) if loss] == [4, 8]
    assert evaluation["loss"] == losses(tmp_path)[-1][2] < np.log(257)
    assert evaluation["bits_per_byte"] == pytest.approx(evaluation["loss"] / np.log(2))
    status = read_status(tmp_path)
    assert (status.status, status.step, status.num_steps) == ("finished", 8, 8)
    assert status.loss == losses(tmp_path)[-2][1]
    assert json.loads((tmp_path / "config.json").read_text())["model"]["embed_dim"] == 16
    assert json.loads((tmp_path / "env.json").read_text())["data"]["train"]["digest"]
    assert (tmp_path / "samples" / "00000008.txt").read_text()

    before = losses(tmp_path)
    assert train(experiment, tmp_path).evaluation == evaluation  # at its end: nothing is done
    assert losses(tmp_path) == before


@pytest.mark.slow
def test_steps_taken_several_a_call_are_the_steps_one_by_one(tmp_path, text):
    alone, together = tmp_path / "alone", tmp_path / "together"
    train(small(text, steps_per_call=1), alone)
    train(small(text, steps_per_call=3, log_every=7, eval_every=8), together)  # 3 1 1 1 1 1
    of_each = [[loss for _, loss, _ in losses(folder) if loss] for folder in (alone, together)]
    assert len(of_each[0]) == 8
    np.testing.assert_allclose(*of_each, rtol=1e-5)


def test_a_step_that_does_not_fit_in_memory_stops_the_run_before_the_first(
    tmp_path, text, monkeypatch
):
    monkeypatch.setattr(memory, "available", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"each device, which has 0\.0001 GB; take a smaller"):
        train(small(text), tmp_path)
    status = read_status(tmp_path)
    assert (status.status, status.step) == ("failed", 0)
    assert "--train.accumulate" in status.why


def test_one_checkpoint_alone_is_not_enough_to_be_killed_by():
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 2, got 1"):
        loop.TrainConfig(keep_checkpoints=1)


@pytest.fixture
def recorded(tmp_path, text):
    """The folder of a run, as far as its config goes."""
    write_json(tmp_path / "config.json", config_json(small(text)))
    return tmp_path


def test_a_run_directory_is_not_written_over(recorded, text):
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        loop.check_run_dir(recorded, small(text), resume=False)


def test_resuming_with_another_model_names_what_differs(recorded, text):
    other = small(text)
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, embed_dim=32))
    with pytest.raises(ValueError, match=r"model\.embed_dim was 16, now 32"):
        loop.check_run_dir(recorded, other, resume=True)
    loop.check_run_dir(recorded, small(text, num_steps=99), resume=True)  # may go on for longer
