"""How often 95 % intervals hold the truth; run as a process by tests/scaling/test_uncertainty.py.

    python tests/scaling/coverage.py RESAMPLING

A process of its own, because the tests' own compiles fast and computes slowly.
"""

import json
import sys

import numpy as np
from conftest import TRUTH, sweep

from scaling.fit import fit
from scaling.runs import read_runs

SETS = 200


def main(resampling: str) -> None:
    """Of 200 sweeps: parameters, predictions at, near and beyond the data, and the best N."""
    x = {"params": np.array([1e5, 3e6, 1e8]), "tokens": np.array([2e6, 6e7, 2e9])}
    budgets = np.array([1e13, 1e16])
    t = TRUTH
    true_loss = t["E"] + t["A"] / x["params"] ** t["alpha"] + t["B"] / x["tokens"] ** t["beta"]
    both = t["alpha"] + t["beta"]
    best = (t["alpha"] * t["A"] / (t["beta"] * t["B"])) ** (1 / both)
    best = best * (budgets / 6.5) ** (t["beta"] / both)
    covered: dict[str, list[bool]] = {name: [] for name in (*t, "prediction", "best size")}
    for seed in range(SETS):
        runs = read_runs(sweep(sizes=8, budgets=8, seed=seed))
        done = fit(runs, loss="mse", bootstrap=200, resampling=resampling, seed=seed)
        for name, value in t.items():
            covered[name].append(done.intervals[name][0] <= value <= done.intervals[name][1])
        loss = done.predict(**x, interval=0.95)
        covered["prediction"].extend((loss.low <= true_loss) & (true_loss <= loss.high))
        low, high = done.optimal(budgets, interval=0.95).intervals["params"]
        covered["best size"].extend((low <= best) & (best <= high))
    print(json.dumps({name: float(np.mean(inside)) for name, inside in covered.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
