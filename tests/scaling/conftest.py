"""Synthetic runs with known truth, and where the published data lie if they are there."""

from pathlib import Path

import numpy as np
import pytest

from scaling.runs import read_runs

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "scaling"

# Of the size that a laptop trains, so that fits here are as well conditioned as in a real sweep.
TRUTH = {"A": 21.0, "B": 58.0, "E": 1.15, "alpha": 0.27, "beta": 0.36}


@pytest.fixture(scope="session")
def published():
    """Reads a published table, or skips where the data are not at hand."""

    def read(name, **options):
        if not (PUBLISHED / name).exists():
            pytest.skip(f"no {name} in shared/data/scaling")
        return read_runs(PUBLISHED / name, **options)

    return read


def sweep(sizes=7, budgets=5, noise=0.004, seed=0):
    """Columns of a synthetic sweep under `TRUTH`: a grid of sizes and tokens, with run names."""
    rng = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(1e4, 1e6, sizes).round(), budgets)
    d = np.tile(np.geomspace(2e5, 6e6, budgets).round(), sizes)
    t = TRUTH
    loss = t["E"] + t["A"] / n ** t["alpha"] + t["B"] / d ** t["beta"]
    return {
        "run_id": [f"n{i // budgets}-d{i % budgets}" for i in range(len(n))],
        "model": [f"n{i // budgets}" for i in range(len(n))],
        "params": n,
        "params_no_embed": (0.8 * n).round(),
        "tokens": d,
        "flops": 6.5 * n * d,
        "loss": loss * np.exp(noise * rng.standard_normal(len(n))),
    }


@pytest.fixture(scope="session")
def synthetic():
    """Makes the columns of a synthetic sweep: `synthetic(noise=..., seed=...)`."""
    return sweep


@pytest.fixture(scope="session")
def truth():
    """The parameters behind `synthetic`."""
    return TRUTH
