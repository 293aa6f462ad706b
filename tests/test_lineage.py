"""The lineage is true: its modules, experiments and notebooks exist, and its graph is a history."""

import ast
import importlib
import pathlib
import re

import pytest

from lineage_jax.lineage import LINEAGE, Milestone, ancestors, find

ROOT = pathlib.Path(__file__).parent.parent
BY_NAME = {milestone.name: milestone for milestone in LINEAGE}

each_milestone = pytest.mark.parametrize("milestone", LINEAGE, ids=lambda m: m.name)


def test_names_and_modules_are_unique_and_years_ordered():
    assert len(BY_NAME) == len({m.module for m in LINEAGE}) == len(LINEAGE)
    years = [milestone.year for milestone in LINEAGE]
    assert years == sorted(years) and years[0] >= 2014


@each_milestone
def test_the_module_opens_with_the_four_parts_in_order(milestone):
    path = ROOT / f"{milestone.module.replace('.', '/')}.py"
    doc = ast.get_docstring(ast.parse(path.read_text()))
    title, parts = doc.split("\n\n", maxsplit=1)
    assert title.count("\n") == 0 and title.endswith(".")
    headings = re.findall(r"^([A-Z][\w ]*): ", parts, re.M)
    assert headings == ["Paper", "Builds on", "What is new", "Departures"]
    assert milestone.url in doc


@each_milestone
def test_the_experiment_exists_and_builds_its_presets(milestone):
    module = importlib.import_module(f"experiments.{milestone.name}")
    assert module.PRESETS
    for preset in module.PRESETS:
        assert module.experiment(preset).train.num_steps > 0
    assert module.experiment() == module.experiment(next(iter(module.PRESETS)))


@each_milestone
def test_the_notebook_exists_if_one_is_named(milestone):
    assert milestone.notebook is None or (ROOT / milestone.notebook).is_file()


@each_milestone
def test_parents_exist_and_are_not_younger(milestone):
    for parent in milestone.parents:
        assert BY_NAME[parent].year <= milestone.year
    assert milestone.name not in [m.name for depth, m in walk(milestone) if depth]


def walk(milestone: Milestone, depth: int = 0):
    """As `ancestors`, but an end to it even if the graph has a cycle."""
    yield depth, milestone
    if depth <= len(LINEAGE):
        for parent in milestone.parents:
            yield from walk(BY_NAME[parent], depth + 1)


@each_milestone
def test_what_is_proved_and_new_is_said(milestone):
    assert milestone.proved and all(milestone.proved) and milestone.new and milestone.paper
    assert next(ancestors(milestone)) == (0, milestone)


def test_a_name_that_is_nearly_right_gets_the_right_one_suggested():
    assert find("gpt") is BY_NAME["gpt"]
    with pytest.raises(ValueError, match=r"no milestone is called 'gtp'; did you mean gpt"):
        find("gtp")
    with pytest.raises(ValueError, match=r"did you mean .*gpt"):
        find("zzzzzz")
