"""Laws are ranked by what they say of runs that they have not seen."""

import pytest

from scaling.compare import compare
from scaling.runs import read_runs


def test_the_law_behind_the_runs_is_ranked_first(synthetic):
    runs = read_runs(synthetic(noise=0.001))
    done = compare(runs, ["kaplan_n", "kaplan_nd", "chinchilla"], holdout="params > 5e5")
    assert done.rows()[0]["law"] == "chinchilla"
    errors = [row["mean_abs_relative_error"] for row in done.rows()]
    assert errors == sorted(errors)


def test_laws_that_the_table_does_not_allow_are_named(synthetic):
    runs = read_runs(synthetic())
    done = compare(runs, ["chinchilla", "data_constrained"], holdout="params > 5e5")
    assert [name for name, _ in done.refused] == ["data_constrained"]
    assert "needs a column 'unique_tokens'" in done.refused[0][1]
    assert "chinchilla_fixed_e" not in {f.law.name for f in done.fits}


def test_a_holdout_must_name_some_runs_and_leave_some(synthetic):
    runs = read_runs(synthetic())
    with pytest.raises(ValueError, match="names 0 of 35 runs"):
        compare(runs, holdout="params > 1e9")
    with pytest.raises(ValueError, match="no law 'gompertz'"):
        compare(runs, ["gompertz"], holdout="params > 5e5")
