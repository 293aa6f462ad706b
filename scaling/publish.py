"""From finished runs to what is read: tables, fit.json and the report."""

import dataclasses
import os
import pathlib
from typing import Any, Literal

from lineage_jax.train.metrics import environment, write_json
from scaling.envelope import Frontier, fit_envelope
from scaling.fit import Fit, fit
from scaling.isoflop import fit_isoflop
from scaling.laws import LAWS
from scaling.plots import figures, write_svg
from scaling.report import write_report
from scaling.runs import Runs, read_curves, read_runs, write_curves, write_runs
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


APPROACHES = ("envelope", "isoflop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to fit somebody's runs."""

    law: str | None = None
    """One law (chinchilla, chinchilla_tied, kaplan_nd, overtraining, data_constrained, ...; a wrong
    name lists them), or Chinchilla's approach 1 or 2, envelope or isoflop; without it, Chinchilla's
    and Kaplan's laws, and a forecast of the largest run."""
    method: Literal["parabola", "akima"] = "parabola"
    """The curve whose minimum counts, of --law isoflop."""
    columns: str = ""
    """What your columns are called: params=N,tokens=D,loss=final_loss,flops=C."""
    where: str | None = None
    """Keep only these rows, such as 'outlier_excluded==0'."""
    holdout: str | None = None
    """Keep these rows from the fit and score the fit on them, such as 'flops>1e21'."""
    loss: Literal["huber", "l1", "mse"] = "huber"
    """Of the residuals (one law only)."""
    delta: float = 1e-3
    """Huber's delta (Hoffmann et al. 2022, section 3.3)."""
    linear: bool = False
    """Residuals of the loss itself, not of its logarithm (one law only)."""
    fix: str = ""
    """Parameters held at a value, such as alpha=0.35,E=1.8 (one law only)."""
    bootstrap: int = 1000
    """Resamples behind each interval."""
    seed: int = 0
    """Of the resampling."""
    json: str | None = None
    """Where to write the fit as JSON; without it and without --report, RUNS-fit.json."""
    report: str | None = None
    """Where to write the report; of all laws only."""


def fit_file(path: str, options: FitOptions) -> list[str]:
    """Fits the runs in a file and writes what was asked for.

    Raises:
      ValueError: if an option, the table or the number of runs is not what a fit needs.
      OSError: if the file cannot be read.
    """
    columns = pairs("--columns", options.columns)
    unknown = columns.keys() - {"params", "tokens", "loss", "flops"}
    if unknown:
        raise ValueError(
            f"--columns names params, tokens, loss and flops, got {', '.join(sorted(unknown))}"
        )
    runs = read_runs(path, where=options.where, **columns)
    if options.law is None:
        return fit_all(path, runs, options)
    if options.report:
        raise ValueError("--report is written for all laws together: leave out --law")
    if options.law in APPROACHES:
        front = frontier(runs, options)
        write_json(options.json or default_json(path), front.to_json())
        return [*frontier_lines(front), f"Written to {options.json or default_json(path)}"]
    if options.law not in LAWS:
        raise ValueError(f"no law {options.law!r}: there are {', '.join((*LAWS, *APPROACHES))}")
    fixed = {name: float(value) for name, value in pairs("--fix", options.fix).items()}
    done = fit(
        runs,
        options.law,
        loss=options.loss,
        delta=options.delta,
        linear=options.linear,
        fix=fixed,
        holdout=options.holdout,
        bootstrap=options.bootstrap,
        seed=options.seed,
    )
    write_json(options.json or default_json(path), done.to_json())
    return [*fit_lines(done), f"Written to {options.json or default_json(path)}"]


def frontier(runs: Runs, options: FitOptions) -> Frontier:
    """Approach 1 or 2, as the options say."""
    if options.holdout or options.fix:
        raise ValueError(f"--law {options.law} predicts no loss: it has no --holdout and no --fix")
    resampling: Any = dict(bootstrap=options.bootstrap, seed=options.seed)
    if options.law == "envelope":
        return fit_envelope(runs, **resampling)
    return fit_isoflop(runs, method=options.method, **resampling)


def frontier_lines(front: Frontier) -> list[str]:
    """A frontier, for the terminal."""
    lines = [f"{front.method} on {front.n_runs} runs, {len(front.flops)} points on the frontier"]
    lines += parameter_lines(front)
    lines += [f"  not used: {reason}" for reason, _ in front.dropped]
    return [*lines, *(f"Warning: {text}" for text in front.warnings)]


def parameter_lines(done: Fit | Frontier) -> list[str]:
    """Each parameter with its interval, for the terminal."""
    lines, width = [], max(map(len, done.parameters)) + 2
    for name, value in done.parameters.items():
        span = done.intervals.get(name)
        told = f"  95 % interval {span[0]:.6g} to {span[1]:.6g}" if span else ""
        lines.append(f"  {name:<{width}}{value:.7g}{told}")
    return lines


def fit_all(path: str, runs: Runs, options: FitOptions) -> list[str]:
    """Every law, with a forecast of the largest run."""
    done = study(runs, holdout=options.holdout, bootstrap=options.bootstrap, seed=options.seed)
    written = []
    if options.json or not options.report:
        written.append(options.json or default_json(path))
        write_json(written[-1], done.to_json())
    if options.report:
        written.append(options.report)
        name = pathlib.Path(path).name
        write_report(
            options.report, done, title=f"Scaling laws of {name}", provenance={"runs": name}
        )
    return [*done.lines(), f"Written to {', '.join(written)}"]


def fit_lines(done: Fit) -> list[str]:
    """One fit, for the terminal."""
    lines = [f"{done.law.name} on {done.n_runs} runs, {done.loss} objective {done.objective:.10g}"]
    lines += parameter_lines(done)
    facts = ", ".join(f"{name} {value}" for name, value in done.certificate.items())
    lines.append(f"  certificate: {facts}")
    if done.holdout:
        lines.append("  holdout: " + ", ".join(f"{k} {v:.4g}" for k, v in done.holdout.items()))
    return [*lines, *(f"Warning: {text}" for text in done.warnings)]


def default_json(path: str) -> str:
    return str(pathlib.Path(pathlib.Path(path).name).with_suffix("")) + "-fit.json"


def pairs(option: str, text: str) -> dict[str, Any]:
    """Reads `a=b,c=d`."""
    out = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} wants name=value,name=value, got {part!r}")
        out[name.strip()] = value.strip()
    return out
