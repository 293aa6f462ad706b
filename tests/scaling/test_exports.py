"""What other tools export is read as it is."""

import numpy as np
import pytest

from scaling.exports import unfold_chart
from scaling.runs import read_runs

CHART = """"Step","small - loss","small - loss__MIN","small - loss__MAX","a - b - loss","a - b - lr"
0,4.5,4.5,4.5,,0.1
10,3.0,3.0,3.0,2.8,0.2
20,2.5,2.5,2.5,2.2,
"""


@pytest.fixture
def chart(tmp_path):
    path = tmp_path / "wandb_export.csv"
    path.write_text(CHART)
    return str(path)


def test_a_chart_of_weights_and_biases_is_the_last_loss_of_each_run(chart):
    runs = read_runs(chart, needs=("loss",))
    assert dict(zip(runs["run_id"], runs["loss"], strict=True)) == {"a - b": 2.2, "small": 2.5}


def test_and_all_its_points_where_curves_are_wanted(chart):
    runs = read_runs(chart, needs=("run_id", "step", "loss"))
    points = sorted(zip(runs["run_id"], runs["step"], runs["loss"], strict=True))
    assert points == [
        *[("a - b", 10, 2.8), ("a - b", 20, 2.2)],
        *[("small", 0, 4.5), ("small", 10, 3.0), ("small", 20, 2.5)],
    ]
    assert runs.dropped == (("loss is not a finite number", 1),)  # at step 0 a rate alone


def test_a_table_that_is_no_chart_stays_as_it_is(synthetic):
    table = read_runs(synthetic()).table
    assert unfold_chart(table) is table


def test_a_folder_without_events_says_what_was_wanted(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no events.out.tfevents files: wanted"):
        read_runs(str(tmp_path))


@pytest.mark.oracle
def test_event_files_of_tensorboard_are_read(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    for n, run in ((1e6, "small"), (1e8, "sizes/large")):
        writer = EventFileWriter(str(tmp_path / run))
        for step in (0, 50, 100):
            values = {"params": n, "tokens": 1e4 * step, "eval/loss": 3.0 - step / 100}
            logged = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
            tensor = make_tensor_proto(np.float32(0.5))
            logged.append(summary_pb2.Summary.Value(tag="accuracy", tensor=tensor))
            summary = summary_pb2.Summary(value=logged)
            writer.add_event(event_pb2.Event(step=step, summary=summary))
        writer.close()
    runs = read_runs(str(tmp_path), loss="eval/loss")
    assert list(runs["run_id"]) == ["small", "sizes/large"]
    assert list(runs["params"]) == [1e6, 1e8]
    assert list(runs["tokens"]) == [1e6, 1e6]
    assert list(runs["loss"]) == [2.0, 2.0]
    assert list(runs["accuracy"]) == [0.5, 0.5]
