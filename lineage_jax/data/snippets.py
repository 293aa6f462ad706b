"""Labelled text that every Python carries: functions, and the package that each comes from."""

import ast
import collections
import functools
import hashlib
import re

from lineage_jax.data.labelled_text import Example, LabelledText
from lineage_jax.data.sources import Document
from lineage_jax.data.standard_library import python_text

PACKAGES = (
    "asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml",
)  # fmt: skip
"""Those of more than a hundred functions that every installation of Python 3.11 to 3.14 has
(idlelib and tkinter may be packages of the system's, distutils and lib2to3 are gone from 3.13)."""

MIN_LENGTH = 200  # characters: less is mostly a name and a call
_NAMES = re.compile("|".join(PACKAGES), re.IGNORECASE)


@functools.cache
def snippets() -> LabelledText:
    """Functions and methods of eight packages of the standard library, as many of each.

    They stand as their authors wrote them, docstrings and comments too, without their indentation.
    Shorter ones than `MIN_LENGTH` are left out, and so are copies. What gives the label away is
    replaced: the name of any of the packages, in whatever letter case, becomes "package". Of the
    packages that have more functions than the smallest, those with the least digests are taken, so
    that a classifier which knows nothing is right in one of eight.
    """
    by_package: dict[str, dict[str, Example]] = collections.defaultdict(dict)
    for document in python_text().documents:
        package = package_of(document)
        if package is not None:
            for line, text in functions(document.text):
                example = Example(f"{document.name}:{line}", (text,), package)
                by_package[package].setdefault(text, example)
    fewest = min(map(len, by_package.values()))
    chosen = [
        example
        for package in PACKAGES
        for example in sorted(by_package[package].values(), key=_digest)[:fewest]
    ]
    return LabelledText("snippets", tuple(chosen))


def package_of(document: Document) -> str | None:
    """Which of the packages a document of `python_text` is of."""
    root, _, rest = document.name.partition("/")
    package = rest.partition("/")[0]
    return package if root == "stdlib" and package in PACKAGES else None


def functions(source: str) -> list[tuple[int, str]]:
    """Line and text of each function at the top of a module or of a class in it."""
    source = source.replace("\f", "")  # which parts some modules in pages
    found, lines = [], source.split("\n")
    nodes = collections.deque(ast.parse(source).body)
    while nodes:
        node = nodes.popleft()
        if isinstance(node, ast.ClassDef):
            nodes.extend(node.body)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            whole = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            text = re.sub(rf"^ {{,{node.col_offset}}}", "", whole, flags=re.MULTILINE)
            text = _NAMES.sub("package", text)
            if len(text) >= MIN_LENGTH:
                found.append((node.lineno, text))
    return sorted(found)


def _digest(example: Example) -> str:
    return hashlib.sha256(example.texts[0].encode()).hexdigest()
