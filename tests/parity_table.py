"""The table in docs/parity.md: how far each system is from an independent implementation.

`python -m pytest tests/models --parity-table docs/parity.md` runs the comparisons and writes it;
with the `oracle` extra there, each system is compared once more live, with other weights. Tests
take part by the marker `parity`, and tell what they find by `record`.
"""

import collections
import pathlib
from typing import Literal

import pytest

from lineage_jax.lineage import LINEAGE

HEAD = "| system | oracle | outputs | gradients | compared |\n|---|---|---|---|---|\n"

INTRODUCTION = """\
# Parity

Every system against an implementation that is not ours, with the same weights: all of them random,
norms and biases too; odd sizes, padding, fewer key-value heads than heads; float32. The largest
difference of an output, and of the gradient of the loss with respect to any parameter, each
relative to the largest entry of its array. At most 1e-4 is allowed end to end, 1e-5 of one layer.
"Compared" counts tests: end to end and layer by layer, from stored results (`tests/golden`) and,
where the other library is there, live with other weights. Written by

    python -m pip install -e '.[oracle]'
    python -m pytest tests/models --parity-table docs/parity.md

"""

_errors: dict[str, list[float]] = collections.defaultdict(list)  # of the test under way
_rows: dict[tuple[str, str], list[dict[str, float]]] = collections.defaultdict(list)  # of the run


def record(of: Literal["outputs", "gradients"], error: float) -> None:
    """Tells the table of a difference, relative to the largest entry."""
    _errors[of].append(float(error))


@pytest.fixture(autouse=True)
def kept_errors(request):
    """Keeps the largest errors of a test that takes part in the table."""
    mark = request.node.get_closest_marker("parity")
    if mark is None:
        yield
        return
    _errors.clear()
    yield
    if _errors:
        if mark.args:
            system, oracle = mark.args
        else:
            case = request.node.funcargs["case"]
            system = type(case.config).__module__.rsplit(".", 1)[-1]
            oracle = f"`transformers` {case.architecture.name}"
        found = {of: max(errors) for of, errors in _errors.items()}
        request.node.user_properties.append(("parity", (system, oracle, found)))


def pytest_runtest_logreport(report):
    """In the process that has all reports, whichever process ran the test."""
    if report.when == "teardown" and not report.failed:
        for name, value in report.user_properties:
            if name == "parity":
                system, oracle, found = value
                _rows[system, oracle].append(found)


def pytest_sessionfinish(session):
    path = session.config.getoption("--parity-table")
    if path and not hasattr(session.config, "workerinput"):
        pathlib.Path(path).write_text(page())


def order(row) -> tuple[int, str]:
    """Of the rows: as in the lineage, and layers first."""
    (system, oracle), _ = row
    names = [one.name for one in LINEAGE]
    return names.index(system) if system in names else -1, oracle


def page() -> str:
    """The page, from the tests that ran."""
    lines = []
    for (system, oracle), tests in sorted(_rows.items(), key=order):
        largest = [
            max((test[of] for test in tests if of in test), default=None)
            for of in ("outputs", "gradients")
        ]
        shown = " | ".join("" if error is None else f"{error:.1e}" for error in largest)
        lines.append(f"| {system} | {oracle} | {shown} | {len(tests)} |\n")
    return INTRODUCTION + HEAD + "".join(lines)
