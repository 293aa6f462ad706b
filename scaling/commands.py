"""What `lineage fit` and `lineage optimal` do."""

import dataclasses
import math
import pathlib
from typing import Any, Literal

from lineage_jax.train.metrics import write_json
from scaling.allocation import Optimal
from scaling.compare import Comparison, compare
from scaling.envelope import Frontier, fit_envelope
from scaling.fit import Fit, fit, read_fit
from scaling.hyperparameters import Hyperparameters, fit_hyperparameters
from scaling.isoflop import fit_isoflop
from scaling.laws import LAWS
from scaling.report import write_report
from scaling.runs import Runs, read_runs
from scaling.study import Study, quantity, study

APPROACHES = ("envelope", "isoflop", "hyperparameters")
ONE_LAW = ("loss", "delta", "linear", "fix", "resampling", "profile")  # options of a law's fit
COLUMNS = (
    *("params", "tokens", "loss", "flops", "unique_tokens", "accuracy"),
    *("learning_rate", "batch_tokens", "run_id", "step"),
)  # that a law may read


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How to fit somebody's runs."""

    law: str | None = None
    """One law (chinchilla, chinchilla_tied, kaplan_nd, overtraining, data_constrained, ...; a wrong
    name lists them), several to be compared on the holdout (chinchilla,kaplan_nd,saturating), or
    an approach: envelope, isoflop (Chinchilla's 1 and 2), hyperparameters. Without it, Chinchilla's
    and Kaplan's laws, and a forecast of the largest run."""
    method: Literal["parabola", "akima"] = "parabola"
    """The curve whose minimum counts, of --law isoflop."""
    columns: str = ""
    """What your columns are called: params=N,tokens=D,loss=final_loss,flops=C; flops=none counts
    FLOPs as 6ND whatever the table says."""
    where: str | None = None
    """Keep only these rows, such as 'outlier_excluded==0'."""
    holdout: str | None = None
    """Keep these rows from the fit and score the fit on them, such as 'flops>1e21'."""
    loss: Literal["huber", "l1", "mse"] = "huber"
    """Of the residuals, with --law."""
    delta: float = 1e-3
    """Huber's delta (Hoffmann et al. 2022, section 3.3)."""
    linear: bool = False
    """Residuals of the loss itself, not of its logarithm, with --law (downstream_sigmoid, of
    accuracies, always)."""
    fix: str = ""
    """Parameters held at a value, such as alpha=0.35,E=1.8 (one law only)."""
    bootstrap: int = 1000
    """Resamples behind each interval."""
    resampling: Literal["cases", "residuals"] = "cases"
    """What is drawn anew: runs, or residuals, with --law."""
    group: str | None = None
    """A column whose values are drawn whole, such as the run_id of points of one curve."""
    profile: str = ""
    """Parameters whose profile likelihood is wanted as well, such as E,alpha (one law only)."""
    seed: int = 0
    """Of the resampling."""
    json: str | None = None
    """Where to write the fit as JSON; without it and without --report, RUNS-fit.json."""
    report: str | None = None
    """Where to write the report of all laws, with --law too; not without sizes and tokens."""


def fit_file(path: str, options: FitOptions) -> list[str]:
    """Fits the runs in a file and writes what was asked for.

    Raises:
      ValueError: if an option, the table or the number of runs is not what a fit needs.
      OSError: if the file cannot be read.
    """
    columns = pairs("--columns", options.columns)
    if unknown := columns.keys() - set(COLUMNS):
        raise ValueError(f"--columns names {', '.join(COLUMNS)}; got {', '.join(sorted(unknown))}")
    if columns.get("flops") == "none":
        columns["flops"] = None
    names = options.law.split(",") if options.law else []
    if unknown := set(names) - set(LAWS) - set(APPROACHES):
        raise ValueError(
            f"no law {', '.join(sorted(unknown))!r}: there are {', '.join((*LAWS, *APPROACHES))}"
        )
    runs = read_runs(path, where=options.where, **columns, **_reading(names))
    done: Fit | Frontier | Hyperparameters | Comparison | Study
    if not names:
        _refuse(options, ONE_LAW, "without --law, each is fitted as its paper does")
        done = every_law(runs, options)
        lines = done.lines()
    elif len(names) > 1:
        done, lines = compared(runs, names, options)
    elif names[0] in APPROACHES:
        done, lines = approach(runs, options)
    else:
        done, lines = one_law(runs, names[0], options)
    written = []
    if names or options.json or not options.report:
        written.append(options.json or default_json(path))
        write_json(written[-1], done.to_json())
    if options.report:
        whole = done if isinstance(done, Study) else every_law(runs, options)
        name = pathlib.Path(path).name
        title, provenance = f"Scaling laws of {name}", {"runs": name}
        write_report(options.report, whole, title=title, provenance=provenance)
        written.append(options.report)
    return [*lines, f"Written to {', '.join(written)}"]


def _refuse(options: FitOptions, names: tuple[str, ...], why: str) -> None:
    """Refuses options that would change nothing."""
    for field in dataclasses.fields(options):
        if field.name in names and getattr(options, field.name) != field.default:
            raise ValueError(
                f"--{field.name} goes with a law that predicts, such as --law chinchilla: {why}"
            )


def _reading(names: list[str]) -> dict[str, Any]:
    """How a table is to be read for some laws: which columns must be there, which rows are one."""
    if "hyperparameters" in names:
        return {"needs": ("params", "tokens", "loss", "learning_rate"), "duplicates": "keep"}
    laws = [LAWS[name] for name in names if name in LAWS]
    if len(names) != 1 or not laws:
        return {}
    law = laws[0]
    return {
        "needs": (*(law.needs or law.columns), law.target),
        "duplicates": "keep" if law.needs else "best",  # points of curves are no duplicates
    }


def one_law(runs: Runs, law: str, options: FitOptions) -> tuple[Fit, list[str]]:
    """One law, as the options say, and its lines for the terminal."""
    fixed = {name: float(value) for name, value in pairs("--fix", options.fix).items()}
    done = fit(
        runs,
        law,
        loss=options.loss,
        delta=options.delta,
        linear=options.linear or None,
        fix=fixed,
        holdout=options.holdout,
        bootstrap=options.bootstrap,
        resampling=options.resampling,
        group=options.group,
        profiles=tuple(filter(None, options.profile.split(","))),
        seed=options.seed,
    )
    return done, fit_lines(done)


def compared(runs: Runs, names: list[str], options: FitOptions) -> tuple[Comparison, list[str]]:
    """Several laws on one holdout, and their lines for the terminal."""
    if options.fix or options.profile or not options.holdout or set(names) & set(APPROACHES):
        raise ValueError(
            "several laws are compared on the runs of --holdout: wanted laws that predict, a "
            "--holdout such as 'flops>1e21', no --fix and no --profile"
        )
    done = compare(
        runs,
        names,
        holdout=options.holdout,
        loss=options.loss,
        delta=options.delta,
        linear=options.linear or None,
        bootstrap=options.bootstrap,
        resampling=options.resampling,
        group=options.group,
        seed=options.seed,
    )
    lines = [f"On the {done.rows()[0]['n_runs']} runs of {options.holdout}, which no law saw:"]
    for row in done.rows():
        covered = "" if row["coverage"] is None else f", {row['coverage']:.0%} inside 95 %"
        lines.append(
            f"  {row['law']:<20} mean error {row['mean_abs_relative_error']:.3%}, bias "
            f"{row['bias']:+.3%}{covered}, {row['free_parameters']} parameters"
        )
    lines += [f"  {law:<20} {why}" for law, why in done.refused]
    return done, lines


def approach(runs: Runs, options: FitOptions) -> tuple[Frontier | Hyperparameters, list[str]]:
    """Approach 1 or 2 or the best hyperparameters, and the lines for the terminal."""
    _refuse(options, ("holdout", *ONE_LAW), f"--law {options.law} predicts no loss")
    resampling: Any = dict(bootstrap=options.bootstrap, seed=options.seed)
    done: Frontier | Hyperparameters
    if options.law == "envelope":
        done = fit_envelope(runs, group=options.group, **resampling)
    elif options.law == "isoflop":
        done = fit_isoflop(runs, method=options.method, **resampling)
    else:
        done = fit_hyperparameters(runs, **resampling)
    lines = [f"{options.law} on {done.n_runs} runs, {len(done.params)} minima or frontier points"]
    lines += parameter_lines(done)
    lines += [f"  not used: {reason}" for reason, _ in done.dropped]
    return done, [*lines, *(f"Warning: {text}" for text in done.warnings)]


def parameter_lines(done: Fit | Frontier | Hyperparameters) -> list[str]:
    """Each parameter with its interval, for the terminal."""
    lines, width = [], max(map(len, done.parameters)) + 2
    for name, value in done.parameters.items():
        span = done.intervals.get(name)
        told = f"  95 % interval {span[0]:.6g} to {span[1]:.6g}" if span else ""
        lines.append(f"  {name:<{width}}{value:.7g}{told}")
    return lines


def every_law(runs: Runs, options: FitOptions) -> Study:
    """Every law, with a forecast of the largest run."""
    return study(
        runs,
        holdout=options.holdout,
        bootstrap=options.bootstrap,
        group=options.group,
        seed=options.seed,
    )


def fit_lines(done: Fit) -> list[str]:
    """One fit, for the terminal."""
    lines = [f"{done.law.name} on {done.n_runs} runs, {done.loss} objective {done.objective:.10g}"]
    lines += parameter_lines(done)
    facts = ", ".join(f"{name} {value}" for name, value in done.certificate.items())
    lines.append(f"  certificate: {facts}")
    if done.holdout:
        scores = [f"{k} {v:.4g}" for k, v in done.holdout.items() if v is not None]
        lines.append(f"  holdout: {', '.join(scores)}")
    for name, found in done.profiles.items():
        low, high = (
            "not bounded" if end is None else f"{end:.6g}" for end in found.to_json()["interval"]
        )
        lines.append(f"  {name}: 95 % by profile likelihood {low} to {high}")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimalOptions:
    """What compute to allocate."""

    flops: float
    """Of training, counted as the fitted runs' were."""
    inference_tokens: float = 0.0
    """Tokens to be served after training: then the cheapest model to train and serve, of those as
    good as the compute-optimal one, is given as well."""
    law: str = "chinchilla"
    """Whose fit, where the file holds several."""
    interval: float = 0.95
    """Coverage of the intervals."""
    json: str | None = None
    """Where to write the answer as JSON."""

    def __post_init__(self):
        if not 0 < self.flops < math.inf:
            raise ValueError(f"flops: wanted a positive number, got {self.flops}")
        if not 0 < self.interval < 1:
            raise ValueError(f"interval: wanted a part of one, got {self.interval}")


def optimal_file(path: str, options: OptimalOptions) -> list[str]:
    """The best use of compute by a fit on disk, as lines for the terminal.

    Raises:
      ValueError: the file is no fit, or of a law that does not divide compute.
      OSError: it cannot be read.
    """
    fitted = read_fit(path, options.law)
    rows = [("compute-optimal", allocated(fitted, options))]
    if options.inference_tokens:
        served = allocated(fitted, options, options.inference_tokens)
        rows.append((f"with {quantity(options.inference_tokens)} tokens to serve", served))
    warnings = cautions(fitted, options.flops)
    lines = [heading(fitted, path)]
    for name, best in rows:
        lines += [f"{name}:", *best_lines(best)]
    if options.json:
        answers = [{"case": name} | dataclasses.asdict(best) for name, best in rows]
        told = {"law": fitted.law.name, "fit": path}
        write_json(options.json, told | {"optimal": answers, "warnings": warnings})
        lines.append(f"Written to {options.json}")
    return [*lines, *(f"Warning: {text}" for text in warnings)]


def allocated(fitted: Fit, options: OptimalOptions, inference_tokens: float = 0.0) -> Optimal:
    """The best use of the options' compute, with intervals where the fit has what they need."""
    interval = options.interval if fitted.draws else None
    return fitted.optimal(options.flops, interval=interval, inference_tokens=inference_tokens)


def cautions(fitted: Fit, flops: float) -> list[str]:
    """What to know before `flops` are spent on a fit's word."""
    without = [] if fitted.draws else ["the fit holds no bootstrap draws: there are no intervals"]
    return [*fitted.cautions(flops), *without]


def heading(fitted: Fit, path: str) -> str:
    """Whose word it is, for the terminal."""
    return f"{fitted.law.name} of {path}, FLOPs counted as {fitted.flops_convention}"


def best_lines(best: Optimal) -> list[str]:
    """A use of compute, for the terminal."""
    lines = []
    for part in ("params", "tokens", "loss", "flops"):
        value, span = getattr(best, part), best.intervals.get(part)
        show = nats if part == "loss" else quantity
        told = f"  [{show(span[0])}, {show(span[1])}]" if span else ""
        lines.append(f"  {part:<7}{show(value)}{told}")
    if best.inference_flops:
        lines.append(f"  and {best.inference_flops:.3g} FLOPs of inference")
    return lines


def nats(loss: float) -> str:
    """A loss, for the terminal."""
    return f"{loss:.4f}"
