"""Tasks made from nothing: told in sentences among ordinary text, or in examples of a new function.

GPT-2 meets tasks as they are told in passing ("`four` in French is `quatre`"; Radford et al. 2019,
table 1) and is then asked without an example; GPT-3 reads examples of a task and goes on (Brown et
al. 2020, figure 2.1).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from lineage_jax.data.sources import Document, is_held_out

TASKS = ("translation", "sum", "reversal")
LARGEST = 999  # number that is translated
LARGEST_TERM = 19
LETTERS, NUM_LETTERS = "abcdef", (2, 4)  # of a word that is reversed


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One case of a task, as a sentence says it: the prompt, a space, the answer, a full stop."""

    task: str
    prompt: str
    answer: str

    @property
    def sentence(self) -> str:
        return f"{self.prompt} {self.answer}."


def demonstrate(task: str, rng: np.random.Generator) -> Demonstration:
    """A case drawn at random.

    "forty-two in French is quarante-deux." (by num2words), "17 plus 25 is 42.", "bad reversed is
    dab."
    """
    if task == "translation":
        number = int(rng.integers(LARGEST + 1))
        return Demonstration(task, f"{in_words(number, 'en')} in French is", in_words(number, "fr"))
    if task == "sum":
        a, b = rng.integers(LARGEST_TERM + 1, size=2).tolist()
        return Demonstration(task, f"{a} plus {b} is", str(a + b))
    assert task == "reversal", task
    least, most = NUM_LETTERS
    word = "".join(rng.choice(list(LETTERS), size=rng.integers(least, most + 1)))
    return Demonstration(task, f"{word} reversed is", word[::-1])


def demonstrations(
    seed: int, *, heldout: bool, heldout_fraction: float = 0.2
) -> Iterator[Demonstration]:
    """Cases without end, the tasks in turn.

    A case is held out by the hash of its prompt: in text made with `heldout=False` it never comes,
    whatever the seed.

    Args:
      seed: of the draw.
      heldout: whether to tell the cases that are held out, or the others.
      heldout_fraction: of all cases.
    """
    rng = np.random.default_rng([seed, heldout])
    while True:
        for task in TASKS:
            case = demonstrate(task, rng)
            while is_held_out(case.prompt.encode(), heldout_fraction) != heldout:
                case = demonstrate(task, rng)
            yield case


def among_text(
    paragraphs: Sequence[str], cases: Iterator[Demonstration], *, cases_per_paragraph: int
) -> list[Document]:
    """Ordinary paragraphs, each a document that goes on with some sentences of tasks."""
    documents = []
    for number, paragraph in enumerate(paragraphs):
        told = [next(cases).sentence for _ in range(cases_per_paragraph)]
        documents.append(Document(f"mixed:{number}", "\n".join([paragraph, *told])))
    return documents


def random_mappings(
    seed: int, step: int, *, rows: int, num_pairs: int, num_keys: int, num_values: int
) -> Int[np.ndarray, "rows length"]:
    """Rows of pairs x, f(x), with a new f in each row: what x maps to can be read in the row alone.

    Args:
      seed: of the draw.
      step: rows of another step are others.
      rows: how many.
      num_pairs: in a row, of 2 `num_pairs` ids.
      num_keys: what x is drawn from; their ids are 0 ... num_keys - 1.
      num_values: what f(x) is drawn from, each key's by itself; their ids are the next.
    """
    rng = np.random.default_rng([seed, step])
    mapping = num_keys + rng.integers(num_values, size=(rows, num_keys))
    keys = rng.integers(num_keys, size=(rows, num_pairs))
    values = np.take_along_axis(mapping, keys, axis=1)
    return np.stack([keys, values], axis=-1).reshape(rows, -1).astype(np.int32)


def linear_functions(
    seed: int, step: int, *, rows: int, num_points: int, dim: int, noise: float
) -> tuple[Float[np.ndarray, "rows points dim"], Float[np.ndarray, "rows points"]]:
    """Points x and y = w x + noise, with a new w in each row (Garg et al. 2022, sections 3 and 4).

    https://arxiv.org/abs/2208.01066. The entries of w and of x are standard normal.

    Args:
      seed: of the draw.
      step: rows of another step are others.
      rows: how many.
      num_points: in a row.
      dim: of x.
      noise: standard deviation of what is added to y.
    """
    rng = np.random.default_rng([seed, step])
    x = rng.standard_normal((rows, num_points, dim))
    w = rng.standard_normal((rows, dim))
    y = np.einsum("rpd,rd->rp", x, w) + noise * rng.standard_normal((rows, num_points))
    return x.astype(np.float32), y.astype(np.float32)


@functools.cache  # num2words makes only some thousands a second
def in_words(number: int, language: str) -> str:
    """As num2words says it."""
    from num2words import num2words

    return num2words(number, lang=language)
