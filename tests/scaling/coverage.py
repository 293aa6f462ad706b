"""How often 95 % intervals hold the truth; run as a process by tests/scaling/test_uncertainty.py.

    python tests/scaling/coverage.py RESAMPLING LOSS

A process of its own, because the tests' own compiles fast and computes slowly.
"""

import json
import sys

import numpy as np
from conftest import TRUTH, sweep

from scaling.fit import fit
from scaling.runs import read_runs

SETS = 200


def main(resampling: str, loss: str) -> None:
    """Of 200 sweeps: the parameters, the loss at three sizes, the best size at two budgets."""
    x = {"params": np.array([1e5, 3e6, 1e8]), "tokens": np.array([2e6, 6e7, 2e9])}
    budgets = np.array([1e13, 1e16])
    t = TRUTH
    true_loss = t["E"] + t["A"] / x["params"] ** t["alpha"] + t["B"] / x["tokens"] ** t["beta"]
    both = t["alpha"] + t["beta"]
    best = (t["alpha"] * t["A"] / (t["beta"] * t["B"])) ** (1 / both)
    best = best * (budgets / 6.5) ** (t["beta"] / both)
    covered: dict[str, list[bool]] = {name: [] for name in t}
    for seed in range(SETS):
        runs = read_runs(sweep(sizes=8, budgets=8, seed=seed))
        done = fit(runs, loss=loss, bootstrap=200, resampling=resampling, seed=seed)
        for name, value in t.items():
            covered[name].append(done.intervals[name][0] <= value <= done.intervals[name][1])
        found = done.predict(**x, interval=0.95)
        low, high = done.optimal(budgets, interval=0.95).intervals["params"]
        for n, inside in zip(
            x["params"], (found.low <= true_loss) & (true_loss <= found.high), strict=True
        ):
            covered.setdefault(f"loss at N {n:.0e}", []).append(inside)
        for c, inside in zip(budgets, (low <= best) & (best <= high), strict=True):
            covered.setdefault(f"best N at C {c:.0e}", []).append(inside)
    print(json.dumps({name: float(np.mean(inside)) for name, inside in covered.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
