"""Claims: the arithmetic of a verdict, what is kept of a run, and that every claim runs."""

import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from num2words import num2words

from experiments import study
from experiments.claims.source_reversal import fixed_vector
from experiments.study import Claim, Finding, Study, bootstrap, count, find, ratio_of_means, text
from experiments.study.heldout import one_pass
from experiments.study.number_words import num_digits, parts
from experiments.study.translation import aligned, number_pairs
from lineage_jax import cli
from lineage_jax.data.pairs import load_pairs
from lineage_jax.lineage import LINEAGE

README = pathlib.Path(__file__).parents[2] / "README.md"


def mean(a):
    return a.mean(-1)


def test_the_interval_of_a_constant_is_that_constant():
    assert bootstrap(mean, np.full(5, 0.25)) == (0.25, 0.25)


def test_the_interval_of_two_seeds_is_of_their_four_draws():
    # Means of the draws: 0, 0.5, 0.5, 1; percentiles are taken between them linearly.
    assert bootstrap(mean, np.array([0.0, 1.0])) == pytest.approx((0.0375, 0.9625))


def test_seeds_are_drawn_in_pairs():
    arm = np.array([1.0, 2.0, 4.0, 8.0])
    assert bootstrap(ratio_of_means, 3 * arm, arm) == pytest.approx((3.0, 3.0))


def test_no_mistakes_against_none_is_a_ratio_of_one():
    none, some = np.zeros((2, 3)), np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(ratio_of_means(none, some), [1.0, 0.0])


@pytest.mark.parametrize(
    "measured, interval, passed",
    [(0.7, (0.6, 0.9), True), (0.85, (0.8, 0.9), False), (0.7, (0.6, 1.1), False)],
)
def test_a_finding_passes_if_both_it_and_its_interval_do(measured, interval, passed):
    finding = Finding(
        name="a ratio",
        measured=measured,
        interval=interval,
        wanted=(None, 0.8),
        interval_wanted=(None, 1.0),
    )
    assert finding.passed is passed


def test_an_interval_is_held_to_the_threshold_if_nothing_else_is_said():
    better = find("a mean", mean, [0.9, 0.9, 0.9], wanted=(0.8, None))
    astride = find("a mean", mean, [0.9, 0.9, 0.7], wanted=(0.8, None))
    assert better.passed
    assert astride.measured > 0.8
    assert not astride.passed


def test_a_count_of_seeds_has_no_interval():
    assert count("wins", np.array([True, True, False]), at_least=2).passed
    assert not count("wins", np.array([True, False, False]), at_least=2).passed


class Straight:
    """An arm whose loss is least at one learning rate, and that says when it is run."""

    def __init__(self, name, best):
        self.name, self.best, self.ran = name, best, []

    def setting(self):
        return {"best": self.best}

    def run(self, *, seed, learning_rate, updates):
        self.ran.append((seed, learning_rate))
        return {"loss": abs(learning_rate - self.best) + 0.1 * seed}


def made(study, arm):
    def findings(numbers):
        return [find("loss", mean, numbers["loss"], wanted=(None, 0.4))]

    told = dict(statement="it is so", where="page 1", criterion="0.4", setting="none")
    return study.claim("heads", [arm], findings, milestone="transformer", **told)


def test_learning_rates_are_chosen_on_a_seed_that_is_not_counted(tmp_path):
    arm = Straight("straight", best=1e-2)
    claim = made(Study(folder=tmp_path), arm)
    rates = Study(folder=tmp_path).learning_rates
    assert arm.ran == [(0, rate) for rate in rates] + [(seed, 1e-2) for seed in (1, 2, 3, 4, 5)]
    assert claim.arms["straight"]["learning_rate"] == 1e-2
    assert claim.findings[0].measured == pytest.approx(0.3)


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    whole = made(Study(folder=tmp_path), Straight("straight", best=1e-2))
    (one, *_) = sorted((tmp_path / "runs").iterdir())
    lost = json.loads(one.read_text())["what"]
    one.unlink()
    again = Straight("straight", best=1e-2)
    resumed = made(Study(folder=tmp_path), again)
    assert again.ran == [(lost["seed"], lost["learning_rate"])]
    assert resumed.findings == whole.findings


def test_a_run_with_another_setting_is_not_read_back(tmp_path):
    made(Study(folder=tmp_path), Straight("straight", best=1e-2))
    other = Straight("straight", best=3e-3)
    made(Study(folder=tmp_path), other)
    assert len(other.ran) == 7


def test_a_claim_is_written_and_read_whole(tmp_path):
    claim = made(Study(folder=tmp_path), Straight("straight", best=1e-2))
    told = json.loads((tmp_path / "heads.json").read_text())
    assert Claim.from_json(told) == claim
    assert told["passed"] is claim.passed
    assert study.read_claims(tmp_path) == [claim]


def test_the_table_says_which_claims_failed(tmp_path):
    failed = made(Study(folder=tmp_path), Straight("straight", best=1.0))
    assert not failed.passed
    row = study.markdown_table([failed]).splitlines()[2]
    assert "**no**" in row
    assert "**not reproduced**" in row


def test_arms_of_one_seed_meet_the_same_pairs(tmp_path):
    forward, backward = (
        load_pairs(number_pairs(quick=True, cache_dir=str(tmp_path), reverse_source=reverse))
        for reverse in (False, True)
    )
    for there, here in (
        (forward.train(3), backward.train(3)),
        (forward.heldout(0), backward.heldout(0)),
    ):
        np.testing.assert_array_equal(there["targets"], here["targets"])
        np.testing.assert_array_equal(np.sort(there["source"]), np.sort(here["source"]))
        assert (there["source"] != here["source"]).any()


def test_no_number_of_the_claims_is_left_out():
    longest = 777_777_777, 797_797_797  # "-dix -sept": most French words for three digits
    pairs = number_pairs()
    for number in longest:
        english, french = (words(num2words(number, lang=lang)) for lang in ("en", "fr"))
        assert len(english) + 1 <= pairs.source_len
        assert len(french) + 1 <= pairs.target_len
    assert len(french) + 1 == pairs.target_len


def test_a_seed_gives_the_same_numbers_again(tmp_path):
    pairs = number_pairs(quick=True, cache_dir=str(tmp_path))
    first, again, other = (
        fixed_vector(pairs, "forward").run(seed=seed, learning_rate=1e-2, updates=2)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first["loss"] != other["loss"]


def words(text):
    return re.findall(r"-?[a-z]+|,", text)


def test_every_french_word_of_a_number_has_an_english_word_that_says_the_same():
    numbers = [*range(1, 2000), *np.random.default_rng(0).integers(100, 10**9, 500).tolist()]
    for number in numbers:
        english, french = (num2words(number, lang=lang) for lang in ("en", "fr"))
        source = parts(words(english))
        for word, said in zip(words(french), parts(words(french)), strict=True):
            true = [place for place, there in enumerate(source) if there & said]
            assert 1 <= len(true) <= 2 or word == "et", (english, french, word)
        assert num_digits(english) == len(str(number))


def test_seventy_two_is_told_apart_word_by_word():
    english = parts(["four", "hundred", "and", "seventy", "-two"])
    french = parts(["quatre", "cent", "soixante", "-douze"])
    assert [[i for i, there in enumerate(english) if there & said] for said in french] == [
        [0],
        [1],
        [3],
        [3, 4],
    ]


def test_attention_may_be_on_a_true_word_or_beside_it():
    source, target = ["five", "hundred", "and", "six"], ["cinq", "cent", "six", ""]
    assert aligned(source, target, np.array([0, 1, 3, 0])) == [True, True, True]
    assert aligned(source, target, np.array([2, 3, 0, 0])) == [False, False, False]


def test_the_readme_has_the_table_of_stored_claims(capsys):
    between = README.read_text().split("<!-- claims -->\n")[1].split("\n<!-- end of claims -->")[0]
    cli.main(["claims", "--table"])
    assert capsys.readouterr().out.strip() == between.strip()


def test_stored_claims_are_full_ones_of_three_seeds_or_more():
    stored = study.read_claims()
    assert stored
    for claim in stored:
        assert claim.form == "full"
        assert all(len(arm["seeds"]) == len(claim.seeds) >= 3 for arm in claim.arms.values())


CLAIMS = [name for one in LINEAGE for name in one.claims]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where texts, their tokens and compiled programs are kept: claims have many in common."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize(
    "name", [name if name == "source_reversal" else pytest.param(name, marks=pytest.mark.slow)
             for name in CLAIMS]
)  # fmt: skip
def test_the_quick_form_runs_from_the_command_line(name, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    # Four updates teach little: what is held out, read whole, would take most of the time.
    monkeypatch.setattr(text, "one_pass", lambda batches: itertools.islice(one_pass(batches), 8))
    cli.main(["claim", name, "--quick", "--dir", str(tmp_path)])
    out = capsys.readouterr().out
    (claim,) = study.read_claims(tmp_path)
    assert "quick form" in out
    assert claim.form == "quick"
    assert np.isfinite([finding.measured for finding in claim.findings]).all()
    assert all(len(arm["seeds"]) == 2 for arm in claim.arms.values())


@pytest.mark.parametrize(
    "command, told",
    [
        (["claim"], "wanted `lineage claim NAME`"),
        (["claim", "seq2sec"], "did you mean seq2seq"),
        (["claim", "seq2seq", "--all"], "wanted `lineage claim NAME`"),
    ],
)
def test_a_claim_that_is_not_there_is_one_line(command, told, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
