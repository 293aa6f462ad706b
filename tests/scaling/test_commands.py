"""`lineage fit` and `lineage optimal` from the command line: what they print and write."""

import json

import numpy as np
import pytest

from lineage_jax import cli
from scaling.runs import write_runs


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder: its output, or its error line and exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            cli.main(list(arguments))
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def runs(tmp_path, synthetic):
    write_runs(synthetic(), tmp_path / "runs.csv")


def read(path):
    return json.loads(path.read_text())


def test_a_fit_on_disk_divides_compute(told, runs, tmp_path):
    told("fit", "runs.csv", "--law", "chinchilla", "--bootstrap", "50", "--json", "fit.json")
    out = told(
        "optimal", "fit.json", "--flops", "1e20", "--inference-tokens", "1e12", "--json", "o.json"
    )  # fmt: skip
    assert "compute-optimal" in out and "with 1T tokens to serve" in out
    assert "times the largest run fitted" in out
    plain, served = read(tmp_path / "o.json")["optimal"]
    assert served["params"] < plain["params"]
    low, high = plain["intervals"]["params"]
    assert low < plain["params"] < high


def test_a_sweeps_own_fit_divides_compute_too(told, runs):
    told("fit", "runs.csv", "--bootstrap", "20", "--json", "all.json")
    assert "compute-optimal" in told("optimal", "all.json", "--flops", "1e15")


def test_several_laws_are_ranked_on_the_holdout(told, runs, tmp_path):
    out = told(
        "fit", "runs.csv", "--law", "kaplan_nd,chinchilla", "--holdout", "params>5e5",
        "--bootstrap", "20",
    )  # fmt: skip
    assert out.index("chinchilla ") < out.index("kaplan_nd ")
    rows = read(tmp_path / "runs-fit.json")["comparison"]
    assert [row["law"] for row in rows] == ["chinchilla", "kaplan_nd"]


def test_a_profile_stands_beside_the_interval(told, runs, tmp_path):
    out = told("fit", "runs.csv", "--law", "chinchilla", "--profile", "E,alpha", "--bootstrap", "0")
    assert "E: 95 % by profile likelihood" in out
    assert set(read(tmp_path / "runs-fit.json")["profiles"]) == {"E", "alpha"}


def test_laws_of_curves_and_of_tasks_need_no_sizes(told, tmp_path):
    loss = np.linspace(1.9, 3.4, 12)
    accuracy = 0.25 + 0.55 / (1 + np.exp(4 * (loss - 2.4)))
    write_runs({"task_loss": loss, "acc": accuracy}, tmp_path / "task.csv")
    told("fit", "task.csv", "--law", "downstream_sigmoid", "--bootstrap", "0", "--columns",
         "loss=task_loss,accuracy=acc")  # fmt: skip
    assert read(tmp_path / "task-fit.json")["parameters"]["L_0"] == pytest.approx(2.4, rel=1e-5)

    step = np.arange(100, 3100, 100)
    rates = np.concatenate([np.full(30, 0.2), 0.1 + 0.1 * np.cos(np.pi * step / 3000)])
    curves = {
        "run": ["constant"] * 30 + ["cosine"] * 30,
        "iter": np.tile(step, 2),
        "lr": rates,
        "val": 2.5 + 0.5 * np.exp(-np.tile(step, 2) / 1000),
    }
    write_runs(curves, tmp_path / "curves.csv")
    out = told("fit", "curves.csv", "--law", "lr_annealing", "--bootstrap", "20", "--group",
               "run_id", "--columns", "run_id=run,step=iter,learning_rate=lr,loss=val")  # fmt: skip
    assert "lr_annealing on 60 runs" in out


def test_the_best_rates_become_a_law(told, tmp_path):
    n, d, octave = (v.ravel() for v in np.meshgrid([1e7, 1e8], [1e9, 1e10], range(-3, 4)))
    rate = 10 * n**-0.5 * d**0.1 * 2.0**octave
    write_runs({"params": n, "tokens": d, "learning_rate": rate, "loss": 2 + 0.01 * octave**2},
               tmp_path / "rates.csv")  # fmt: skip
    told("fit", "rates.csv", "--law", "hyperparameters", "--bootstrap", "20")
    found = read(tmp_path / "rates-fit.json")["parameters"]
    assert found["lr_params_exponent"] == pytest.approx(-0.5, abs=1e-6)
    assert found["lr_tokens_exponent"] == pytest.approx(0.1, abs=1e-6)


def test_one_law_has_its_json_and_the_report_of_all(told, runs, tmp_path):
    told("fit", "runs.csv", "--law", "chinchilla", "--holdout", "params>5e5", "--bootstrap", "20",
         "--json", "out.json", "--report", "out.html")  # fmt: skip
    assert read(tmp_path / "out.json")["law"] == "chinchilla"
    assert "params&gt;5e5" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--law", "chinchilla,kaplan_nd"], "a --holdout such as"),
        (["--law", "chinchilla,envelope", "--holdout", "params>1e5"], "wanted laws that predict"),
        (
            ["--law", "envelope", "--profile", "a"],
            "--profile goes with a law that predicts",
        ),
        (["--loss", "l1"], "--loss goes with a law that predicts"),
        (["--law", "gompertz"], "there are kaplan_n"),
        (["--law", "hyperparameters"], "no column 'learning_rate'"),
        (["--law", "chinchilla", "--columns", "size=N"], "--columns names params, tokens"),
        (["--law", "chinchilla", "--group", "family"], "no column 'family'"),
    ],
)
def test_what_cannot_be_done_is_one_line(told, runs, arguments, wanted):
    code, line = told("fit", "runs.csv", "--bootstrap", "5", *arguments)
    assert code == 2 and wanted in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        ([], 2, "wanted `lineage optimal FIT.json"),
        (["runs.csv", "--flops", "1e20"], 2, "is not a fit"),
        (["runs.csv", "--flops", "-1"], 2, "wanted a positive number"),
        (["runs.csv"], 2, "--flops"),
        (["nowhere.json", "--flops", "1e20"], 1, "nowhere.json"),
    ],
)
def test_what_cannot_be_allocated_is_one_line(told, runs, arguments, code, wanted):
    got, line = told("optimal", *arguments)
    assert (got, line.count("\n")) == (code, 1) and wanted in line
