"""Every notebook runs from top to bottom: compiled fast, not well, and trained for a few updates.

`python -m pytest tests/test_notebooks.py --whole-notebooks` runs them as a reader does, and says
how long each took (`-rP`): they promise three minutes on a CPU.
"""

import pathlib
import re
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.py"))
PUBLISHED = ROOT.parent / "shared" / "data" / "scaling" / "chinchilla_svg.csv"
QUICK = {
    r"(?m)^(\w*UPDATES) = \d+$": r"\1 = 10",
    r"(?m)^BUDGETS = .*$": "BUDGETS = 1, 2, 4",
    r"(?m)^COUNTS = .*$": "COUNTS = 1, 8",
    r"bootstrap=\d+": "bootstrap=20",
}


def quick(source):
    """A notebook that trains for a few updates, and draws few samples."""
    for named, few in QUICK.items():
        source = re.sub(named, few, source)
    return source


@pytest.fixture
def environment(process_environment, monkeypatch, request):
    """Of the notebook's process."""
    if request.config.getoption("--whole-notebooks"):
        process_environment = {}
        monkeypatch.delenv("XLA_FLAGS")
    for name, value in {**process_environment, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, environment, recwarn, request):
    source = path.read_text()
    whole = request.config.getoption("--whole-notebooks")
    execute(path.name, source if whole else quick(source), tmp_path)


@pytest.mark.slow
def test_without_its_data_the_replication_runs_on_synthetic_points(tmp_path, environment, recwarn):
    if not PUBLISHED.exists():
        pytest.skip("no data: the other test runs on synthetic points")
    source = (ROOT / "colab" / "chinchilla_replication.py").read_text()
    source, replaced = re.subn(r"(?m)^CSV = .*$", 'CSV = "nowhere.csv"', quick(source))
    assert replaced == 1
    outputs = execute("chinchilla_replication.py", source, tmp_path)
    assert any("SYNTHETIC" in output.get("text", "") for output in outputs)


def execute(name, source, folder):
    """Runs a notebook in a folder; its outputs, among them a figure and no error."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.reads(source, fmt="py:percent")
    began = time.monotonic()
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    print(f"{name}: {time.monotonic() - began:.0f} s")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    return outputs


def test_no_notebook_trains_for_a_number_of_updates_that_is_not_named():
    for path in NOTEBOOKS:
        assert not re.findall(r"updates=\d", path.read_text()), path.name


def test_the_notebooks_are_scripts_too():
    for path in NOTEBOOKS:
        subprocess.run([sys.executable, "-m", "py_compile", str(path)], check=True)
