"""From finished runs to what is read: tables, fit.json and the report."""

import os
import pathlib

from lineage_jax.train.metrics import environment, write_json
from scaling.plots import figures, write_svg
from scaling.report import write_report
from scaling.runs import read_curves, read_runs, write_curves, write_runs
from scaling.study import study
from scaling.sweep import Sweep, runs_table


def publish(sweep: Sweep, folder: str | os.PathLike, *, bootstrap: int) -> list[str]:
    """Writes the tables of a finished sweep, fits the laws, writes fit.json, figures and report.

    results.csv and what follows from it hold nothing that differs between two runs of the same
    sweep on the same machine; timings stand in timings.csv.

    Returns:
      Lines for the terminal.
    """
    folder = pathlib.Path(folder)
    runs, curves, timings = runs_table(sweep, folder)
    for suffix in ("csv", "parquet"):
        write_runs(runs, folder / f"results.{suffix}")
        write_curves(curves, folder / f"curves.{suffix}")
    write_runs(timings, folder / "timings.csv")
    done = study(
        read_runs(folder / "results.csv"),
        read_curves(folder / "curves.csv"),
        bootstrap=bootstrap,
        seed=sweep.seed,
    )
    write_json(folder / "fit.json", done.to_json())
    (folder / "figures").mkdir(exist_ok=True)
    for name, (figure, _) in figures(done).items():
        write_svg(figure, folder / "figures" / f"{name}.svg")
    told = environment()
    provenance = {
        "command": f"lineage sweep {sweep.name}",
        "python": told["python"],
        "devices": told["devices"],
        "packages": ", ".join(f"{name} {version}" for name, version in told["packages"].items()),
        "training time": f"{sum(timings['seconds']) / 60:.1f} minutes of one machine",
    }
    write_report(
        folder / "report.html",
        done,
        title=f"Scaling laws of the {sweep.name} sweep",
        checklist=sweep.facts,
        provenance=provenance,
    )
    return [
        *done.lines(),
        f"Written to {folder}: report.html, figures/, fit.json, results.csv, curves.csv",
    ]
