"""Commands about the lineage itself: what is in it, and what was measured of it."""

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Sequence

from lineage_jax import lineage
from lineage_jax.cli.terminal import UsageError, options, pick, say, take_option


def list_(arguments: Sequence[str]) -> None:
    """`lineage list`: the milestones as a table."""
    if arguments:
        raise UsageError(f"`lineage list` takes nothing, got {' '.join(arguments)}")
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "milestone", "year", "what is new", "parents")
    for one in lineage.LINEAGE:
        table.add_row(one.name, one.title, str(one.year), one.new, ", ".join(one.parents))
    Console(highlight=False).print(table)


def show(arguments: Sequence[str]) -> None:
    """`lineage show NAME`: one milestone and the tree of its parents."""
    if len(arguments) != 1:
        raise UsageError("wanted `lineage show NAME`; `lineage list` has the names")
    from rich.console import Console
    from rich.tree import Tree

    one = lineage.find(arguments[0])
    say = Console(highlight=False, soft_wrap=True).print
    say(f"{one.title} ({one.year}): {one.new}\n{one.paper}\n{one.url}\n")
    say(f"model       {one.module.replace('.', '/')}.py")
    say(f"experiment  experiments/{one.name}.py   `lineage train {one.name} --help`")
    presets = ", ".join(importlib.import_module(f"experiments.{one.name}").PRESETS)
    say(f"presets     {presets}")
    if one.claims:
        say(f"claims      {', '.join(one.claims)}   `lineage claim {one.name}`")
    if one.notebook:
        say(f"notebook    {one.notebook}")
    say("proved      " + "\n            ".join(one.proved) + "\n")

    def tree(milestone: lineage.Milestone, node: Tree) -> None:
        for parent in map(lineage.find, milestone.parents):
            tree(parent, node.add(f"{parent.title} ({parent.year})"))

    root = Tree(f"{one.title} ({one.year})")
    tree(one, root)
    say(root)


def diff(arguments: Sequence[str]) -> None:
    """`lineage diff PARENT CHILD [--preset PRESET]`: what the child changed."""
    names = list(arguments)
    preset = take_option(names, "--preset", "")
    if len(names) != 2:
        raise UsageError("wanted `lineage diff PARENT CHILD`; `lineage list` has the names")
    from rich.console import Console
    from rich.table import Column, Table

    from experiments.difference import difference

    parent, child = names
    table, part = Table(Column("", no_wrap=True), parent, child), ""
    for row in difference(parent, child, preset or None):
        if row.part != part:
            table.add_section()
            part = row.part
        table.add_row(row.name, row.left, row.right)
    Console(highlight=False, markup=False).print(table)


def claim(arguments: Sequence[str]) -> None:
    """`lineage claim NAME [--quick]`, or `lineage claim --all`: what a paper is known for."""
    known = {one.name: one.claims for one in lineage.LINEAGE}
    known |= {name: (name,) for claims in known.values() for name in claims}
    name, rest = "", list(arguments)
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        pick("milestone or claim", name, known, hint="`lineage list` shows milestones")

    @dataclasses.dataclass(frozen=True)
    class Options:
        all: bool = False
        """Every claim, one after the other."""
        quick: bool = False
        """A few updates of two seeds: shows that it runs, and says nothing of the paper."""
        dir: str | None = None
        """Where what was run is kept, to go on after a kill: runs/claims, or runs/claims-quick."""

    chosen = options(Options, Options(), rest, f"lineage claim {name or 'NAME'}")
    if chosen.all == bool(name):
        raise UsageError("wanted `lineage claim NAME` or `lineage claim --all`")
    chosen_claims = [each for one in lineage.LINEAGE for each in one.claims]
    if name:
        chosen_claims = list(known[name])
    if not chosen_claims:
        raise UsageError(f"{name} has no claim yet")
    from experiments.study import Study
    from lineage_jax.train.compilation import compilation_cache

    folder = chosen.dir or os.path.join("runs", "claims-quick" if chosen.quick else "claims")
    study = Study(folder=pathlib.Path(folder), quick=chosen.quick, say=say)
    with compilation_cache():
        for each in chosen_claims:
            module = importlib.import_module(f"experiments.claims.{each}")
            say("\n".join(module.claim(study).lines()))


def claims(arguments: Sequence[str]) -> None:
    """`lineage claims`: the claims that were measured, and how each came out."""
    from experiments.study import RESULTS, markdown_table, read_claims

    @dataclasses.dataclass(frozen=True)
    class Options:
        table: bool = False
        """As the table in the README."""
        dir: str = str(RESULTS)
        """Where they are."""

    chosen = options(Options, Options(), arguments, "lineage claims")
    found = read_claims(pathlib.Path(chosen.dir))
    if chosen.table:
        print(markdown_table(found))
    else:
        print("\n\n".join("\n".join(one.lines()) for one in found) or f"none in {chosen.dir}")
