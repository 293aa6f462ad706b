"""Times the fit of Chinchilla's law against SciPy: `python -m experiments.benchmarks.scaling_fit`.

The 240 points that Besiroglu et al. 2024 (arXiv 2404.10102) fitted, their objective (the sum of
Huber terms of log-loss residuals, delta 1e-3), a grid of 4500 starts, and 4000 bootstraps of cases.
SciPy does it one by one: BFGS on the objective times 1e6, with analytic gradients in numpy, over
the grid of Hoffmann et al. 2022 (appendix D.2). That takes minutes, so only a random part is timed,
and extrapolated. It also runs with our recipe, all starts screened and the best four polished. The
package `chinchilla` from PyPI takes part if it is installed. Contenders take turns, each in a fresh
process, so that every round pays for compilation anew.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[3] / "shared" / "data" / "scaling" / "chinchilla_svg.csv"
# Besiroglu et al. 2024, table 1: what the synthetic points are made from
PUBLISHED = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
DELTA = 1e-3  # Hoffmann et al. 2022, section 3.3
SCALE = 1e6  # of SciPy's objective: its default tolerances are for numbers around one
AGREE = 1e-6  # relative: objectives this close are the same optimum
POLISHED = 4  # of the screened starts
# Hoffmann et al. 2022, appendix D.2: logarithms of A, B and E, and the exponents
GRID = {
    "a": np.arange(0.0, 26.0, 5.0),
    "b": np.arange(0.0, 26.0, 5.0),
    "e": np.arange(-1.0, 1.1, 0.5),
    "alpha": np.arange(0.0, 2.1, 0.5),
    "beta": np.arange(0.0, 2.1, 0.5),
}
COLUMNS = ("params", "tokens", "loss")
Columns = dict[str, np.ndarray]


def find_columns(path: Path | None) -> tuple[str, Columns]:
    """What is fitted, and its params, tokens and loss: a table, or synthetic points."""
    if path is None and not DATA.exists():
        return "240 synthetic points of the published law", synthetic()
    from scaling.runs import read_runs

    runs = read_runs(path or DATA)
    if "outlier_excluded" in runs:
        runs = runs.take(runs["outlier_excluded"] == 0)
    name = f"{len(runs)} points of {(path or DATA).name}"
    return name, {name: runs[name] for name in COLUMNS}


def synthetic(points: int = 240, seed: int = 0) -> Columns:
    """Points of the published law with noise: forty sizes, 1e18 to 1e22 FLOPs, in random order."""
    rng = np.random.default_rng(seed)
    n = rng.permutation(np.resize(np.geomspace(6e7, 1.6e10, 40), points))
    low = np.maximum(np.maximum(1e9, 1e18 / (6 * n)), n / 2)
    high = np.minimum(3e11, 1e22 / (6 * n))
    d = low * (high / low) ** rng.uniform(size=points)
    p = PUBLISHED
    loss = p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]
    # 0.005 is the mean absolute residual of the published points
    return {"params": n, "tokens": d, "loss": loss * np.exp(rng.laplace(0, 0.005, points))}


def objective(
    u: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray, weights: Any = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The sum of Huber terms, and its gradient, at u = (log A, log B, log E, alpha, beta), (L, 5).

    log L is the logsumexp of the logarithms of the three terms (Hoffmann et al. 2022, equation 3).
    """
    a, b, e, alpha, beta = u.T[..., None]
    terms = np.stack(np.broadcast_arrays(a - alpha * log_n, b - beta * log_d, e))  # 3 L R
    top = terms.max(0)
    parts = np.exp(terms - top)
    total = parts.sum(0)
    residuals = top + np.log(total) - log_loss
    size = np.abs(residuals)
    value = np.where(size < DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))
    slope = weights * np.clip(residuals, -DELTA, DELTA)
    by_a, by_b, by_e = slope * parts / total
    gradient = (by_a, by_b, by_e, -by_a * log_n, -by_b * log_d)
    return (weights * value).sum(-1), np.stack([g.sum(-1) for g in gradient], -1)


def found(seconds: dict[str, float], value: float, u: np.ndarray, **told: Any) -> dict[str, Any]:
    """What a contender tells of one round; `u` as in `objective`."""
    natural = [*np.exp(u[:3]), *u[3:]]
    parameters = dict(zip(("A", "B", "E", "alpha", "beta"), map(float, natural), strict=True))
    return {"seconds": seconds, "objective": float(value), "parameters": parameters, **told}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that the work takes, and its result."""
    start = time.perf_counter()
    done = work()
    return time.perf_counter() - start, done


def ours(columns: Columns, bootstraps: int) -> dict[str, Any]:
    """`scaling.fit` in a process that has compiled nothing, and again if there is no bootstrap."""
    imported, scaling = timed(lambda: importlib.import_module("scaling"))
    runs = scaling.read_runs(columns, duplicates="keep")
    first, fit = timed(lambda: scaling.fit(runs, "chinchilla", delta=DELTA, bootstrap=bootstraps))
    if bootstraps:
        seconds = {"grid and bootstraps": first}
    else:
        again, _ = timed(lambda: scaling.fit(runs, "chinchilla", delta=DELTA))
        seconds = {"import": imported, "grid": first, "grid again": again}
    return {
        "seconds": seconds,
        "objective": fit.objective,
        "parameters": fit.parameters,
        "certificate": fit.certificate,
        "standard_errors": fit.standard_errors,
    }


def scipy(
    columns: Columns, *, starts: int, tried: int, bootstraps: int, refits: int, seed: int
) -> dict[str, Any]:
    """BFGS, one start and one bootstrap after another; seconds are extrapolated from a part."""
    from scipy.optimize import minimize

    log_n, log_d, log_loss = (np.log(columns[name]) for name in COLUMNS)
    rng = np.random.default_rng(seed)
    grid = np.array(list(itertools.product(*GRID.values())))
    grid = grid[rng.permutation(len(grid))[:starts]]

    def polish(u: np.ndarray, weights: Any = 1.0) -> Any:
        def scaled(u: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = objective(u[None], log_n, log_d, log_loss, weights)
            return SCALE * value[0], SCALE * gradient[0]

        with np.errstate(all="ignore"):
            return minimize(scaled, u, jac=True, method="BFGS")

    def screen() -> Any:
        values = np.concatenate(
            [objective(part, log_n, log_d, log_loss)[0] for part in np.array_split(grid, 45)]
        )
        best = np.argsort(values)[:POLISHED]
        return min((polish(grid[i]) for i in best), key=lambda done: done.fun)

    screened_in, screened = timed(screen)
    ends_in, ends = timed(lambda: [polish(u) for u in grid[:tried]])
    best = min([screened, *ends], key=lambda done: done.fun)

    def refit() -> list[np.ndarray]:
        draws = rng.integers(len(log_n), size=(refits, len(log_n)))
        return [polish(best.x, np.bincount(row, minlength=len(log_n))).x for row in draws]

    refits_in, _ = timed(refit)
    values = np.array([done.fun for done in ends])
    return found(
        {
            "grid": ends_in * len(grid) / len(ends),
            "grid screened": screened_in,
            "bootstraps": refits_in * bootstraps / refits,
        },
        best.fun / SCALE,
        best.x,
        objective_screened=float(screened.fun / SCALE),
        starts={
            "tried": len(ends),
            "reached": int((values <= best.fun * (1 + AGREE)).sum()),
            "reported success": int(sum(done.success for done in ends)),
        },
    )


def package(columns: Columns, *, starts: int, tried: int, seed: int) -> dict[str, Any]:
    """`chinchilla` from PyPI with its log-Huber loss, scaled alike: its mean of 1e-6 would stop.

    It takes a grid of starts, so of each parameter's values one or two are drawn.
    """
    from chinchilla import Chinchilla
    from chinchilla._metrics import log_huber

    rng = np.random.default_rng(seed)
    two = int(np.log2(max(tried, 1)))
    drawn = {
        name: tuple(map(float, np.sort(rng.choice(values, 2 if i < two else 1, replace=False))))
        for i, (name, values) in enumerate(GRID.items())
    }
    grid = {name: drawn[name] for name in ("e", "a", "b", "alpha", "beta")}  # the order it wants
    n, d, loss = (columns[name] for name in COLUMNS)
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        fit = Chinchilla(
            project_dir=folder,
            param_grid=grid,
            loss_fn=lambda true, guess: SCALE * len(n) * log_huber(true, guess, DELTA),
            log_level=50,
        )
        fit.visualizer.optim = lambda *_, **__: None  # it draws after every fit
        for row in zip(6 * n * d, n, d, loss, strict=True):
            fit.append(**dict(zip(("C", "N", "D", "loss"), map(float, row), strict=True)))
        seconds, _ = timed(fit.fit)
    size = int(np.prod([len(values) for values in grid.values()]))
    p = fit.params
    u = np.array([np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]])
    value, _ = objective(u[None], np.log(n), np.log(d), np.log(loss))
    return found({"grid": seconds * starts / size}, value[0], u, starts={"tried": size})


CONTENDERS: dict[str, Callable[[Columns, argparse.Namespace], dict[str, Any]]] = {
    "scaling": lambda columns, _: ours(columns, 0),
    "scaling, bootstrap": lambda columns, args: ours(columns, args.bootstrap),
    "scipy": lambda columns, args: scipy(
        columns,
        starts=args.starts,
        tried=args.tried,
        bootstraps=args.bootstrap,
        refits=args.refits,
        seed=args.seed,
    ),
    "chinchilla": lambda columns, args: package(
        columns, starts=args.starts, tried=min(args.tried, 32), seed=args.seed
    ),
}


def take_turn(name: str, data: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One round of a contender, in a fresh process."""
    options = ["--starts", args.starts, "--bootstrap", args.bootstrap, "--tried", args.tried]
    options += ["--refits", args.refits, "--seed", seed, "--data", data, "--work", name]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.scaling_fit", *map(str, options)],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    if done.returncode:
        raise ValueError(f"the process of {name} ended early; its error stands above")
    return json.loads(done.stdout.splitlines()[-1])


def ratios(medians: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How many times longer the others take than we do, of median seconds."""
    fit, everything = medians["scaling"], medians["scaling, bootstrap"]["grid and bootstraps"]
    theirs = medians["scipy"]
    out = {
        "grid: scipy / scaling": theirs["grid"] / fit["grid again"],
        "grid: scipy / scaling with compilation": theirs["grid"] / fit["grid"],
        "grid: scipy screened / scaling": theirs["grid screened"] / fit["grid again"],
        "grid and bootstraps: scipy / scaling with compilation": (
            (theirs["grid"] + theirs["bootstraps"]) / everything
        ),
        "grid and bootstraps: scipy screened / scaling with compilation": (
            (theirs["grid screened"] + theirs["bootstraps"]) / everything
        ),
    }
    if "chinchilla" in medians:
        out["grid: chinchilla / scaling"] = medians["chinchilla"]["grid"] / fit["grid again"]
    return out


def summary(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds of a contender: median seconds, the best end, and how many starts reached it."""
    best = min(rounds, key=lambda told: told["objective"])
    counts = [told["starts"] for told in rounds if "starts" in told]
    return best | {
        "contender": name,
        "seconds": {
            what: float(np.median([told["seconds"][what] for told in rounds]))
            for what in best["seconds"]
        },
        "rounds": [told["seconds"] for told in rounds],
        "starts": {what: sum(count[what] for count in counts) for what in (*counts[0],)}
        if counts
        else {},
    }


def describe(told: Mapping[str, Any], args: argparse.Namespace) -> str:
    """A contender in a few lines."""
    parts = {"grid": args.starts, "bootstraps": args.bootstrap} if told["starts"] else {}
    lines = [f"{told['contender']}: sum of Huber terms {told['objective']:.10e}"]
    lines.append("  " + ", ".join(f"{k} {v:.7g}" for k, v in told["parameters"].items()))
    for what, median in told["seconds"].items():
        every = [seconds[what] for seconds in told["rounds"]]
        note = f", extrapolated to {parts[what]}" if what in parts else ""
        lines.append(f"  {what:<20} {median:9.2f} s [{min(every):.2f}, {max(every):.2f}]{note}")
    if "reached" in told["starts"]:
        tried, reached, said = (told["starts"][k] for k in ("tried", "reached", "reported success"))
        lines.append(
            f"  {reached} of {tried} starts ({reached / tried:.0%}) reached the optimum; it "
            f"reported success for {said} ({said / tried:.0%})"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, help="a table of params, tokens and loss")
    parser.add_argument("--starts", type=int, default=4500, help="of SciPy's grid; 4500 are all")
    parser.add_argument("--bootstrap", type=int, default=4000, help="replicates")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--tried", type=int, default=200, help="starts that SciPy is timed on")
    parser.add_argument("--refits", type=int, default=100, help="replicates SciPy is timed on")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        columns = dict(zip(COLUMNS, np.load(args.data), strict=True))
        print(json.dumps(CONTENDERS[args.work](columns, args)))
        return 0
    try:
        source, columns = find_columns(args.runs)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    names = list(CONTENDERS)
    if not importlib.util.find_spec("chinchilla"):
        names.remove("chinchilla")
        print("chinchilla: not installed, left out (pip install chinchilla)")
    versions = {p: importlib.metadata.version(p) for p in ("jax", "numpy", "scipy")}
    print(f"{source}; {', '.join(f'{k} {v}' for k, v in versions.items())}; {cores} cores")
    print(
        f"SciPy is timed on {args.tried} starts and {args.refits} bootstraps, on one core;", end=" "
    )
    print("the others use all cores; [least, most] of the rounds")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "runs.npy"
        np.save(data, np.stack([columns[name] for name in COLUMNS]))
        for seed in range(args.rounds):
            for name in names:
                rounds[name].append(take_turn(name, data, args, seed))
    results = [summary(name, told) for name, told in rounds.items()]
    ratio = ratios({told["contender"]: told["seconds"] for told in results})
    print("\n".join(describe(told, args) for told in results))
    print("\n".join(f"{what:<64} {value:8.1f}" for what, value in ratio.items()))
    if args.json:
        report = {
            "runs": source,
            "python": platform.python_version(),
            "versions": versions,
            "cores": cores,
            "options": {k: getattr(args, k) for k in ("starts", "bootstrap", "tried", "refits")},
            "results": results,
            "ratios": ratio,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
