"""A plan brackets every optimum, counts what the sweep trains, and is trained as it stands."""

import dataclasses
import functools
import json
import pickle

import jax
import numpy as np
import pytest

from experiments.planned import planned, repetition
from lineage_jax.models import gpt
from lineage_jax.sharding import MeshConfig, make_mesh
from lineage_jax.train.progress import Progress
from scaling import flops
from scaling.fit import fit
from scaling.plan import (
    PlanOptions,
    expected_optimum,
    ladder,
    make_plan,
    next_runs,
    plan_file,
    read_plan,
    remaining_variance,
    trained_steps,
)
from scaling.plan.grid import SHORTEST
from scaling.runs import read_runs

OPTIONS = PlanOptions(flops_min=1e15, flops_max=1e18, hardware="h200", price=2.0, chips=4)
# A token for each parameter, in rows of 16: minutes become seconds.
TINY = PlanOptions(flops_min=3e9, flops_max=6e9, budgets=2, sizes=4, tokens_per_param=0.9,
                   seq_len=16)  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    return make_plan(OPTIONS)


@pytest.fixture
def written(tmp_path):
    """The path of the tiny plan, on disk."""
    path = str(tmp_path / "plan.json")
    plan_file(dataclasses.replace(TINY, json=path))
    return path


def changed(path, change):
    """The plan of that path after an edit."""
    with open(path) as file:
        told = json.load(file)
    change(told)
    with open(path, "w") as file:
        json.dump(told, file)
    return path


def test_the_ladder_rises_in_small_steps_of_sensible_shapes():
    shapes = ladder()
    counts = [shape.params(257, 256) for shape in shapes]
    steps = np.divide(counts[1:], counts[:-1])
    assert steps.min() > 1.2 and steps.max() < 2.2
    assert counts[0] < 20e3 and counts[-1] > 170e9
    for shape in shapes:
        head = shape.embed_dim // shape.num_heads
        assert head == 64 if shape.embed_dim >= 256 else head in (8, 16, 32)
        assert shape.num_heads * head == shape.embed_dim
        if shape.embed_dim >= 128:
            assert 54 <= shape.embed_dim / shape.num_layers <= 128


@pytest.mark.parametrize("config", [gpt.gpt3_125m(), gpt.gpt3_6_7b(), gpt.gpt3_175b()])
def test_the_ladder_has_shapes_of_gpt3s_table(config):
    assert (config.num_layers, config.embed_dim) in {
        (shape.num_layers, shape.embed_dim) for shape in ladder()
    }


@pytest.mark.parametrize("rung", [0, 1, 6, 13, 30])
def test_closed_forms_count_what_the_model_has(rung):
    shape = ladder()[rung]
    config = shape.config(300, 48)
    told = gpt.num_params(config)
    assert shape.params(300, 48) == told["total"]
    assert shape.non_embedding == told["non_embedding"]
    assert shape.flops_per_token(300, 48) == flops.gpt(config, 48).train()


@pytest.mark.parametrize("sizes", [4, 5, 7, 8])
def test_every_budget_has_as_many_sizes_below_its_optimum_as_above(sizes):
    plan = make_plan(dataclasses.replace(OPTIONS, sizes=sizes, budgets=6))
    for budget in {run.budget for run in plan.grid()}:
        optimum = expected_optimum(budget, 20.0, None)
        assert 6 * optimum * 20 * optimum == pytest.approx(budget)
        counts = [r.shape.params(257, 256) for r in plan.grid() if r.budget == budget]
        below = sum(count < optimum for count in counts)
        assert len(counts) == sizes
        assert (sizes - 1) // 2 <= below <= (sizes + 2) // 2


def test_a_size_serves_several_budgets(plan):
    totals = plan.totals()
    assert totals["runs"] == 5 * 7
    assert len(plan.sizes) < 20
    assert max(len(size.steps) for size in plan.sizes) >= 3


def test_flops_of_each_run_are_exact_and_within_two_percent_of_the_budget(plan):
    for run in plan.grid():
        exact = flops.gpt(run.shape.config(257, 256), 256).train() * run.tokens
        assert run.flops == exact
        assert run.flops == pytest.approx(run.budget, rel=5 / SHORTEST)
        assert run.tokens == run.steps * plan.batch_size * plan.seq_len
        assert run.six_nd == 6 * run.shape.params(257, 256) * run.tokens
        assert run.steps >= SHORTEST


def test_totals_are_the_sums_of_the_runs_and_follow_the_hardware(plan):
    totals, grid = plan.totals(), plan.grid()
    for name in ("flops", "trained_flops", "seconds", "cost"):
        assert totals[name] == pytest.approx(sum(getattr(run, name) for run in grid))
    assert totals["seconds"] == pytest.approx(totals["trained_flops"] / (989e12 * 0.4 * 4))
    assert totals["cost"] == pytest.approx(totals["seconds"] / 3600 * 4 * 2.0)
    free = make_plan(dataclasses.replace(OPTIONS, hardware=None, price=None))
    assert free.totals()["seconds"] is None and free.totals()["cost"] is None


def test_a_trunk_is_trained_once_and_each_budget_cools_down_from_it(plan):
    # Three rates of 100 steps; 240 - 80 and 500 - 190: from where the trunk before them ended.
    assert trained_steps(plan.optimizer, (100, 240, 500)) == [300, 160, 310]


def test_batch_and_rates_start_from_deepseeks_rule(plan):
    assert 0.7 < plan.batch_tokens / (0.2920 * 1e15**0.3271) < 1.42
    rule = 0.3118 * 1e15**-0.125  # at that batch; at 2^14 or 2^15 tokens within a root of it
    assert plan.sizes[0].learning_rate == pytest.approx(rule, rel=0.2)
    rates = [size.learning_rate for size in plan.sizes]
    assert rates == sorted(rates, reverse=True)


def test_a_fit_says_where_the_optima_are(synthetic):
    law = fit(read_runs(synthetic(noise=0.0)), "chinchilla")
    plan = make_plan(dataclasses.replace(OPTIONS, flops_min=1e14, flops_max=1e16), law)
    counts = [r.shape.params(257, 256) for r in plan.grid() if r.budget == 1e16]
    assert counts[2] < float(law.optimal(1e16).params) < counts[4]
    assert any("times the largest run fitted" in text for text in plan.assumptions)


def test_a_plan_is_the_same_after_being_written_and_read(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    again = read_plan(str(path))
    assert again == plan
    assert again.to_json() == plan.to_json()


def test_an_edit_that_holds_together_is_taken(written):
    def edit(told):
        size = told["sizes"][0]
        size["learning_rate"] = 0.5
        size["runs"] = [{"budget": run["budget"], "steps": 400} for run in size["runs"][:1]]
        del told["totals"]
        for run in (run for size in told["sizes"] for run in size["runs"]):
            run.pop("seconds", None)

    size = read_plan(changed(written, edit)).sizes[0]
    assert (size.learning_rate, size.steps) == (0.5, (400,))


@pytest.mark.parametrize(
    "edit, told",
    [
        (lambda p: p.pop("seq_len"), "seq_len: wanted int, got null"),
        (lambda p: p.update(plan=99), "is not a plan"),
        (lambda p: p.update(batch_size="many"), "batch_size: wanted int, got \"many\""),
        (lambda p: p.update(batch_size=0), "batch_size: wanted a positive number, got 0"),
        (lambda p: p.update(dtype="float7"), "dtype: wanted one of float32"),
        (lambda p: p.update(hardware="h20"), "did you mean h200"),
        (lambda p: p.update(sizes=[]), "sizes: wanted one or more"),
        (lambda p: p["sizes"].reverse(), "by rising parameters"),
        (lambda p: p["sizes"][0].update(num_heads=5), "num_heads must divide embed_dim"),
        (lambda p: p["sizes"][0].update(learning_rate=-1), "learning_rate of 2x"),
        (lambda p: p["sizes"][0].update(params=1), "sizes[0].params: wanted"),
        (lambda p: p["sizes"][0].update(runs=[]), "has no runs"),
        (lambda p: p["sizes"][0]["runs"][0].update(steps=255), "ascending multiples of 10"),
        (lambda p: p["sizes"][0]["runs"][0].update(steps=900), "sizes[0].runs[0].tokens"),
        (lambda p: p["totals"].update(flops=1), "totals.flops: wanted"),
    ],
)  # fmt: skip
def test_an_edit_that_makes_no_sense_is_refused_by_name(written, edit, told):
    with pytest.raises(ValueError) as error:
        read_plan(changed(written, edit))
    assert told in str(error.value) and written in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"law": "chinchilla"}'])
def test_a_file_that_is_no_plan_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="is not a plan"):
        read_plan(str(tmp_path / "x.json"))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"flops_min": 1e18, "flops_max": 1e15}, "wanted 0 < --flops-min < --flops-max"),
        ({"budgets": 0}, "--budgets: wanted 1 or more, got 0"),
        ({"budgets": 60}, "--budgets: wanted 38 or fewer"),
        ({"sizes": 3}, "--sizes: wanted 4 or more"),
        ({"hardware": "h2000"}, "did you mean h200"),
        ({"hardware": None}, "price: wanted the hardware too"),
        ({"mfu": 40.0}, "mfu: wanted a part of one"),
        ({"chips": 0}, "chips: wanted a positive number"),
        ({"batch_tokens": 1000}, "--batch-tokens: wanted a multiple of --seq-len 256"),
        ({"batch_tokens": 256_000}, "250 are wanted: raise --flops-min, or lower --batch-tokens"),
        ({"flops_min": 1e10}, "go past the smallest shape there is"),
        ({"flops_max": 1e26}, "go past the largest shape there is"),
        ({"tokenizer": "t.json"}, "wanted its --vocab-size too"),
        ({"target": 1e20}, "wanted --fit FIT.json"),
        ({"fit": "f.json", "target_params": 1e9}, "--target-params with --target-tokens"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(options, told):
    with pytest.raises(ValueError) as error:
        make_plan(dataclasses.replace(OPTIONS, **options))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_remaining_variance_is_the_exact_posterior_of_a_linear_gaussian_law():
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 3))
    seen, target, noise = rng.standard_normal((3, 6)), rng.standard_normal(3), 0.3
    prior = np.cov(draws, rowvar=False)
    posterior = [
        target @ np.linalg.inv(np.linalg.inv(prior) + np.outer(x, x) / noise) @ target
        for x in seen.T
    ]
    left = remaining_variance(draws @ target, draws @ seen, noise)
    np.testing.assert_allclose(left, posterior, rtol=1e-9)
    # A run that measures the target itself without noise leaves rounding of a variance of order 1.
    left = remaining_variance(draws @ target, (draws @ target)[:, None], 0.0)
    np.testing.assert_allclose(left, 0, atol=1e-12)


@pytest.mark.slow
def test_the_run_advised_narrows_the_prediction_more_than_the_worst(synthetic, truth):
    target = (4e7, 2e8)
    options = PlanOptions(flops_min=1e12, flops_max=3e13, budgets=3, sizes=7, seq_len=16)
    plan = make_plan(options)
    ratios = []
    for seed in range(3):
        columns = synthetic(sizes=5, budgets=4, noise=0.01, seed=seed)
        law = fit(read_runs(columns), "chinchilla", bootstrap=100)
        runs = next_runs(law, target, plan)
        assert runs[0].after <= runs[-1].after <= runs[0].now
        rng = np.random.default_rng(seed)
        spreads = []
        for run in (runs[0], runs[-1]):
            loss = truth["E"] + truth["A"] / run.params ** truth["alpha"]
            loss += truth["B"] / run.tokens ** truth["beta"]
            row = {
                "run_id": "more",
                "model": "more",
                "params": float(run.params),
                "params_no_embed": float(run.params),
                "tokens": run.tokens,
                "flops": run.flops,
                "loss": loss * np.exp(0.01 * rng.standard_normal()),
            }
            more = {name: [*values, row[name]] for name, values in columns.items()}
            again = fit(read_runs(more), "chinchilla", bootstrap=100)
            span = again.predict(params=target[0], tokens=target[1], interval=0.95)
            spreads.append(np.log(span.high / span.low))
        ratios.append(spreads[0] / spreads[1])
    assert np.exp(np.mean(np.log(ratios))) < 0.9


def test_next_runs_need_draws_and_stay_within_the_plan(synthetic, plan):
    law = fit(read_runs(synthetic()), "chinchilla", bootstrap=50)
    runs = next_runs(law, (1e9, 2e10), plan)
    assert max(run.flops for run in runs) <= 1e18
    assert min(run.tokens for run in runs) >= SHORTEST * plan.batch_tokens
    with pytest.raises(ValueError, match="without bootstrap draws"):
        next_runs(dataclasses.replace(law, draws={}), (1e9, 2e10), plan)


def test_a_plan_becomes_a_sweep_of_the_same_counts(written):
    plan = read_plan(written)
    spec = pickle.loads(pickle.dumps(functools.partial(planned, written)))  # as workers get it
    sweep = spec()
    assert sweep.train.tokens_per_batch == plan.batch_tokens
    assert repetition(sweep) is None
    for size, one in zip(sweep.sizes, plan.sizes, strict=True):
        assert size.params == one.shape.params(257, 16)
        assert size.params_no_embed == one.shape.non_embedding
        assert size.flops_per_token == one.shape.flops_per_token(257, 16)
        assert (size.budgets, size.learning_rate) == (one.steps, one.learning_rate)
    small = dataclasses.replace(sweep.sizes[0], budgets=(10_000_000,))
    line = repetition(dataclasses.replace(sweep, sizes=(small,)))
    assert line is not None and "times the" in line


@pytest.mark.slow
def test_a_tiny_plan_is_trained_as_it_counts(tmp_path, monkeypatch):
    from scaling import sweep as sweeps

    trained = {}
    advance = sweeps.Program.advance

    def counted(self, states, rates, start, stop, tick):
        steps = (stop - start) * len(states)
        trained[self.size.name] = trained.get(self.size.name, 0) + steps
        return advance(self, states, rates, start, stop, tick)

    monkeypatch.setattr(sweeps.Program, "advance", counted)
    monkeypatch.setattr("scaling.plan.grid.SHORTEST", 8)  # steps, for a test's sake
    written = str(tmp_path / "plan.json")
    small = {"flops_min": 1e9, "flops_max": 1.5e9, "tokens_per_param": 0.3}
    plan_file(dataclasses.replace(TINY, **small, json=written))
    plan, sweep = read_plan(written), planned(written)
    sweep = dataclasses.replace(sweep, eval_batches=4)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with Progress() as progress:
        sweeps.run(sweep, tmp_path / "sweep", mesh, progress)
    runs = read_runs(sweeps.runs_table(sweep, tmp_path / "sweep")[0], duplicates="keep")
    for size in plan.sizes:
        mine = runs["model"] == size.shape.name
        rates = len(set(runs["learning_rate"][mine]))
        steps = sum(trained_steps(plan.optimizer, size.steps)) + (rates - 3) * size.steps[0]
        assert trained[size.shape.name] == steps
        assert set(runs["tokens"][mine]) == {run.tokens for run in plan.runs(size)}
        assert set(runs["flops"][mine]) == {run.flops for run in plan.runs(size)}
    assert np.isfinite(runs["loss"]).all() and runs["loss"].max() < np.log(257)
