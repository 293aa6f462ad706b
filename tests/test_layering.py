"""Imports point one way, milestones import their parents alone, and files have names."""

import ast
import pathlib

import pytest

from lineage_jax.lineage import LINEAGE

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("lineage_jax", "experiments", "scaling")

LAYERS = (
    {"typing"},
    {"kernels"},
    {"sharding", "nn", "objectives", "data", "lineage"},
    {"models"},
    {"adapters", "sampling", "pretrained"},
    {"train"},
    {"pods"},
    {"experiments", "scaling"},
    {"cli", "colab"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Rooms of one layer do not know each other, but for an experiment, which says what its model costs.
NEIGHBOURS = {("experiments", "scaling")}
# Lower rooms that a room does without all the same.
FORBIDDEN = {("models", "sharding"), ("models", "objectives")}

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def room(module: str) -> str:
    """Which of the names in `LAYERS` a module belongs to: lineage_jax.nn.mlp -> nn."""
    parts = module.split(".")
    return parts[1] if parts[0] == "lineage_jax" and len(parts) > 1 else parts[0]


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: pathlib.Path):
    """(line, module) of every import in a file, inside functions too.

    `from lineage_jax import nn` imports lineage_jax.nn; what else is named after a module is told
    from its own names by there being a file.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                here = ROOT / inner.replace(".", "/")
                is_module = here.is_dir() or here.with_suffix(".py").exists()
                yield node.lineno, inner if is_module else node.module


def own(path: pathlib.Path):
    """(line, module) of the imports from this repository."""
    tops = (*PACKAGES, "colab", "tests")
    return [(line, module) for line, module in imports(path) if module.split(".")[0] in tops]


def allowed(here: str, there: str) -> bool:
    if here == there or here == "lineage_jax":
        return True
    if (here, there) in FORBIDDEN or "tests" in (here, there):
        return False
    return RANK[there] < RANK[here] or (here, there) in NEIGHBOURS


def test_no_module_imports_a_later_room_or_a_neighbour():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        for line, module in own(path)
        if not allowed(room(module_of(path)), room(module))
    ]
    assert not wrong


def test_every_room_has_a_place_in_the_order():
    rooms = {room(module_of(path)) for path in FILES} - {"lineage_jax"}
    assert rooms <= set(RANK)


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ("models", "nn", True),
        ("train", "models", True),
        ("experiments", "scaling", True),
        ("nn", "models", False),
        ("models", "objectives", False),
        ("objectives", "models", False),
        ("models", "sharding", False),
        ("nn", "objectives", False),
        ("scaling", "experiments", False),
        ("train", "tests", False),
    ],
)
def test_the_order_is_that_of_the_house(here, there, expected):
    assert allowed(here, there) is expected


def test_data_knows_no_jax():
    jax_too = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}  # jaxtyping needs none of them
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sorted((ROOT / "lineage_jax" / "data").rglob("*.py"))
        for line, module in imports(path)
        if module.split(".")[0] in jax_too or module == "lineage_jax.typing"  # which imports jax
    ]
    assert not wrong


def test_a_milestone_imports_another_only_if_it_is_a_parent():
    by_module = {milestone.module: milestone for milestone in LINEAGE}
    names = {milestone.name: milestone.module for milestone in LINEAGE}
    wrong = []
    for path in sorted((ROOT / "lineage_jax" / "models").glob("*.py")):
        module = module_of(path)
        if path.name == "__init__.py":
            continue
        assert module in by_module, f"{module} is in models/ but not in the lineage"
        parents = {names[parent] for parent in by_module[module].parents}
        for line, other in own(path):
            if room(other) == "models" and other not in parents:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {other}, no parent of it")
    assert not wrong


def test_no_file_is_named_for_holding_anything():
    vague = {"utils", "util", "common", "misc", "helpers", "registry", "deprecated", "v2"}
    assert not [path for path in FILES if vague & {path.stem, *path.parent.parts}]
