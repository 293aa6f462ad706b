"""A fit on disk: Chinchilla's law of seven sizes, with noise and draws."""

import json

import numpy as np
import pytest

from scaling.fit import fit
from scaling.runs import read_runs


@pytest.fixture(scope="session")
def fitted():
    """Runs of up to 1e21 FLOPs under the law of Hoffmann et al. 2022, equation 10."""
    rng = np.random.default_rng(0)
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 3e9, 7), np.geomspace(1e9, 5e10, 5)))
    loss = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
    runs = {
        "params": n,
        "tokens": d,
        "flops": 6 * n * d,
        "loss": loss * np.exp(0.004 * rng.standard_normal(n.size)),
    }
    return fit(read_runs(runs), bootstrap=40)


@pytest.fixture(scope="session")
def fit_json(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "fit.json"
    path.write_text(json.dumps(fitted.to_json()))
    return str(path)
