"""The text that every Python installation carries: its help topics and its standard library."""

import os
import pathlib
import platform
import sys
import sysconfig
from collections.abc import Sequence

from lineage_jax.data.sources import Corpus, Document

# Not prose and not a programmer's code: packages of tests, and tables that scripts wrote
# (`encodings` is 8-bit code pages and 30 copies of one template; `pydoc_data` is the topics,
# which are read as prose already).
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
_SKIPPED_MODULES = frozenset(
    {
        "_opcode_metadata.py",
        "html/entities.py",
        "locale.py",
        "re/_casefix.py",
        "stringprep.py",
    }
)


def python_text() -> Corpus:
    """The text that this Python carries: about ten megabytes of English and of Python.

    Documents are the topics of `help()` (the prose of the language reference, one document a
    topic) and the modules of the standard library. A module is one document as its author wrote
    it, docstrings in their places: there they are read beside the code that they describe, no
    docstring is said twice, and a module is wholly held out or wholly trained on.

    The topics quote one another ("for" is a section of "compound"), and so do some modules;
    what mostly repeats a larger document is left out, or held-out text would have been seen in
    training. Tests, generated tables, installed packages and what is not UTF-8 are left out.
    The same on one build of Python; the digest tells builds apart.
    """
    documents = sorted(_topics() + _modules(), key=lambda document: document.name)
    if not any(document.name.startswith("stdlib/") for document in documents):
        raise FileNotFoundError(
            f"wanted the standard library's source under {sysconfig.get_path('stdlib')}, found "
            "none (an embedded Python?); name a text of your own (--data.path)"
        )
    return Corpus(f"python-{platform.python_version()}", _without_repeats(documents))


def _topics() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document(f"topics/{name}", text) for name, text in topics.items()]


def _modules() -> list[Document]:
    """The standard library's own modules, by path; others' files in its folder are left out."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    documents = []
    for folder, subfolders, names in os.walk(root):
        here = pathlib.Path(folder).relative_to(root)
        ours = sys.stdlib_module_names if here == pathlib.Path() else None  # deeper: all are
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and (ours is None or name in ours)
        ]
        for name in names:
            path = (here / name).as_posix()
            if not name.endswith(".py") or path in _SKIPPED_MODULES:
                continue
            if ours is None or name.removesuffix(".py") in ours:
                data = (root / path).read_bytes()
                try:
                    documents.append(Document(f"stdlib/{path}", data.decode()))
                except UnicodeDecodeError:  # a few old modules are in other encodings
                    continue
    return documents


def _without_repeats(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Leaves out each document of which paragraphs in larger ones make up more than half."""
    seen: set[str] = set()
    kept: set[str] = set()
    for document in sorted(documents, key=lambda d: (-len(d.text), d.name)):
        paragraphs = [paragraph.strip() for paragraph in document.text.split("\n\n")]
        size = sum(map(len, paragraphs))
        repeated = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if size and repeated <= size / 2:
            kept.add(document.name)
            seen.update(paragraphs)
    return tuple(document for document in documents if document.name in kept)
