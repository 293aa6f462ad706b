"""Tasks in files: examples of a prompt and its answer, and the contexts that show some of them."""

import dataclasses
import json
import os
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """One line of a task.

    Attributes:
      prompt: what is asked.
      choices: what may be answered; the answer alone where it is to be written freely.
      answer: which of the choices is right.
      where: file and line, for errors.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    where: str

    @property
    def right(self) -> str:
        return self.choices[self.answer]


@dataclasses.dataclass(frozen=True)
class TaskFile:
    """Examples of one task, all to be answered alike.

    Attributes:
      examples: in the order of their lines.
      chosen: whether the answer is one of some choices, or is written freely.
    """

    examples: tuple[Example, ...]
    chosen: bool


def read_task(path: str | os.PathLike) -> TaskFile:
    """Reads a task from JSON lines.

    A line is {"prompt": "2 plus 3 is", "answer": "5"}, to be written freely, or
    {"prompt": "2 plus 3 is", "choices": ["4", "5"], "answer": 1}, of which one is to be chosen.
    `gs://` paths work.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: it has fewer than two lines, or lines of both kinds; or a line is neither, naming
        file and line.
    """
    from etils import epath

    place = epath.Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such file; wanted a task as .jsonl (--few-shot)")
    try:
        lines = place.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: wanted UTF-8 text: {error}") from None
    rows = [(f"{place}:{i}", line) for i, line in enumerate(lines, start=1) if line.strip()]
    read = [_read_line(where, line) for where, line in rows]
    if len(read) < 2:
        raise ValueError(f"{place}: wanted two examples or more, came {len(read)}")
    kinds = [chosen for _, chosen in read]
    if len(set(kinds)) > 1:
        first = rows[kinds.index(not kinds[0])][0]
        raise ValueError(f"{first}: wanted choices on every line of a task or on none")
    return TaskFile(tuple(example for example, _ in read), kinds[0])


def _read_line(where: str, line: str) -> tuple[Example, bool]:
    wanted = (
        '{"prompt": text, "answer": text} or {"prompt": text, "choices": [text, ...], '
        '"answer": index}'
    )
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: wanted {wanted}, came: {error}") from None
    row = row if isinstance(row, dict) else {}
    prompt, choices, answer = (row.get(name) for name in ("prompt", "choices", "answer"))
    if isinstance(prompt, str) and choices is None and isinstance(answer, str) and answer.strip():
        return Example(prompt.rstrip(), (answer.strip(),), 0, where), False
    if (
        isinstance(prompt, str)
        and isinstance(choices, list)
        and all(isinstance(choice, str) and choice.strip() for choice in choices)
        and type(answer) is int
        and 0 <= answer < len(choices)
    ):
        return Example(prompt.rstrip(), tuple(c.strip() for c in choices), answer, where), True
    raise ValueError(f"{where}: wanted {wanted}, came {line.strip()[:80]}")


def draw_shots(num_examples: int, num_shots: int, which: int, seed: int) -> list[int]:
    """Which other examples are shown before one: drawn from the rest, without replacement.

    Those of fewer shots are the first of those of more.

    Raises:
      ValueError: the rest has fewer.
    """
    if num_shots >= num_examples:
        raise ValueError(
            f"wanted {num_shots} other examples in the context, the task has {num_examples - 1}"
        )
    order = np.random.default_rng([seed, which]).permutation(num_examples - 1)
    return [other + (other >= which) for other in order[:num_shots].tolist()]


def context(shown: Sequence[Example], prompt: str) -> str:
    """Examples with their answers, one a line, and a prompt that has none yet.

    A newline stands between two of them (Brown et al. 2020, section 2.4) and a space before an
    answer; the answer's own space is not part of the context, as tokenizers join it to the word.
    """
    return "\n".join([*(f"{one.prompt} {one.right}" for one in shown), prompt])
