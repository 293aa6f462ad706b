"""metrics.jsonl grows, on a disk and in a bucket, and begins again where a run resumes."""

import json

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from lineage_jax.train.metrics import JsonLines


class Bucket(MemoryFileSystem):
    """Objects that do not grow: to append is to write over, as gcsfs says and does."""

    cachable = False

    def open(self, path, mode="rb", **options):
        return super().open(path, mode.replace("a", "w"), **options)


@pytest.fixture(params=["disk", "bucket"])
def path(request, tmp_path, monkeypatch):
    if request.param == "disk":
        return epath.Path(tmp_path) / "metrics.jsonl"
    bucket = Bucket()
    bucket.store.clear()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: bucket)
    return epath.Path("gs://bucket/run/metrics.jsonl")


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_every_line_stays_through_every_flush(path):
    lines = JsonLines(path, 0)
    for step in range(1, 7):
        lines.write(step, {"loss": 1.0 / step})
        if step % 2 == 0:
            lines.flush()
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_resumes_keeps_the_lines_before(path):
    lines = JsonLines(path, 0)
    for step in range(1, 6):
        lines.write(step, {"loss": float(step)})
    lines.close()
    again = JsonLines(path, 3)
    assert again.last == {"step": 3, "loss": 3.0}
    again.write(4, {"loss": 40.0})
    again.close()
    assert steps(path) == [1, 2, 3, 4]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 40.0
