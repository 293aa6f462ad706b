"""Scaling laws: run or read a sweep, fit the laws, forecast, report.

runs = read_runs("x.csv", where="outlier_excluded==0")
law = fit(runs, "chinchilla", bootstrap=4000)
law.predict(params=70e9, tokens=1.4e12, interval=0.95)
"""

from typing import Any

from scaling.compare import Comparison, compare
from scaling.envelope import Frontier, fit_envelope
from scaling.fit import Fit, fit, read_fit
from scaling.hyperparameters import Hyperparameters, fit_hyperparameters
from scaling.isoflop import fit_isoflop
from scaling.laws import LAWS, Law, Parameter
from scaling.runs import Runs, read_curves, read_runs, write_curves, write_runs
from scaling.study import Study, study

__all__ = [
    "LAWS",
    "Comparison",
    "Fit",
    "Frontier",
    "Hyperparameters",
    "Law",
    "Parameter",
    "Runs",
    "Study",
    "compare",
    "fit",
    "fit_envelope",
    "fit_hyperparameters",
    "fit_isoflop",
    "read_curves",
    "read_fit",
    "read_runs",
    "study",
    "write_curves",
    "write_report",
    "write_runs",
]


def __getattr__(name: str) -> Any:
    """`write_report` when it is first asked for: matplotlib takes a second to import."""
    if name == "write_report":
        from scaling.report import write_report

        return write_report
    raise AttributeError(f"module 'scaling' has no attribute {name!r}")
