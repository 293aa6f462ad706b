"""Every notebook runs from top to bottom."""

import pathlib
import re
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.py"))
PUBLISHED = ROOT.parent / "shared" / "data" / "scaling" / "chinchilla_svg.csv"
MINUTES = 3  # on a CPU, as each notebook promises; CI machines are shared, so it is not asserted


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch, recwarn):
    execute(path.name, path.read_text(), tmp_path, monkeypatch)


@pytest.mark.slow
def test_without_its_data_the_replication_runs_on_synthetic_points(tmp_path, monkeypatch, recwarn):
    if not PUBLISHED.exists():
        pytest.skip("no data: the other test runs on synthetic points")
    source = (ROOT / "colab" / "chinchilla_replication.py").read_text()
    source, replaced = re.subn(r"(?m)^CSV = .*$", 'CSV = "nowhere.csv"', source)
    assert replaced == 1
    outputs = execute("chinchilla_replication.py", source, tmp_path, monkeypatch)
    assert any("SYNTHETIC" in output.get("text", "") for output in outputs)


def execute(name, source, folder, monkeypatch):
    """Runs a notebook in a folder; its outputs, among them a figure and no error."""
    import jupytext
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS")
    notebook = jupytext.reads(source, fmt="py:percent")
    began = time.monotonic()
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    print(f"{name}: {time.monotonic() - began:.0f} s")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    return outputs


def test_the_notebooks_are_scripts_too():
    for path in NOTEBOOKS:
        subprocess.run([sys.executable, "-m", "py_compile", str(path)], check=True)
