"""Few-shot evaluation: a model reads some examples of a task and then one without its answer.

Brown et al. 2020, sections 2.1 and 2.4, https://arxiv.org/abs/2005.14165. Nothing is trained:
examples stand in the context, K of them, and K = 0 and 1 are zero- and one-shot.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import speaking, translation
from experiments.saved import Saved
from lineage_jax.data.tasks import Example, TaskFile, context, draw_shots, read_task
from lineage_jax.data.tokenizers import Tokenizer
from lineage_jax.pretrained import Pretrained
from lineage_jax.sampling.beam import batch_axes, beam_search
from lineage_jax.sampling.scoring import score_continuations
from lineage_jax.typing import Params

Normalise = Literal["tokens", "characters", "answer"]
"""What makes choices of unlike length comparable: the log-probability of a choice by its tokens
(Brown et al. 2020, section 2.4, most tasks); by its characters (Touvron et al. 2023, section 3); or
less its log-probability after "Answer:" alone (both papers, some tasks)."""
UNCONDITIONAL = "Answer:"  # what stands for the context, then
WIDTHS = 32  # rows are filled up to a multiple of it: few lengths, and so few programs


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model that was opened, with its tokenizer.

    Attributes:
      module: with GPT's call (`experiments.language`).
      empty_cache: of rows and positions.
      params: of the module.
      max_len: the longest text that it reads, in tokens.
      tokenizer: of its text.
      first: ids that stand before any text.
      batch_size: rows at a time.
    """

    module: Any
    empty_cache: Callable[[int, int], Any]
    params: Params
    max_len: int
    tokenizer: Tokenizer
    first: Sequence[int]
    batch_size: int = 8

    @classmethod
    def of(cls, folder: str, opened: Saved | Pretrained, batch_size: int) -> "Model":
        """That of a run, or of a Hugging Face folder with a tokenizer."""
        config, params = speaking.config_and_params(opened)
        build, empty_cache = speaking.LANGUAGE_MODELS[type(config)]
        tokenizer = speaking.text_tokenizer(folder, opened)
        return cls(
            module=build(config),
            empty_cache=functools.partial(empty_cache, config),
            params=params,
            max_len=config.max_len,
            tokenizer=tokenizer,
            first=speaking.first_token(opened, tokenizer),
            batch_size=batch_size,
        )

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, after what stands before any text."""
        return np.append(self.first, self.tokenizer.encode(text))

    def log_probs(self, pairs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Of each (context, continuation): nats of the continuation, and its number of tokens.

        The continuation begins at the first token that the context alone would not have had, which
        may hold the context's last letters too.
        """
        rows, starts = [], []
        for before, after in pairs:
            whole, alone = self.encode(before + after), self.encode(before)
            size = min(len(whole) - 1, len(alone))
            same = whole[:size] == alone[:size]
            rows.append(whole)
            starts.append(size if same.all() else int(same.argmin()))
        score, found = scorer(self.module), []
        for tokens, ends, some in self._batches(rows):
            begin = np.ones(self.batch_size, np.int32)
            begin[: len(some)] = [starts[i] for i in some]
            scores = score(self.params, tokens, begin, ends)
            found.append([x[: len(some)] for x in scores])
        log_probs, counts, _ = (np.concatenate(x) for x in zip(*found, strict=True))
        return log_probs.astype(np.float64), counts

    def answers(
        self, contexts: Sequence[str], num_tokens: int, *, num_beams: int, alpha: float
    ) -> list[str]:
        """What is written after each context, up to the end of the line."""
        end = self.tokenizer.end_of_text
        newline = int(np.append(end, self.tokenizer.encode("\n"))[-1])  # some drop white space
        search = searcher(self.module, self.empty_cache, num_tokens, newline, num_beams, alpha)
        written = []
        for tokens, ends, some in self._batches([self.encode(text) for text in contexts]):
            for ids in np.asarray(search(self.params, tokens, ends))[: len(some)]:
                text = self.tokenizer.decode(translation.until(ids, end))
                written.append(text.split("\n")[0].strip())
        return written

    def _batches(
        self, rows: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, range]]:
        """(tokens, lengths, which rows), all of one shape: the last is filled up, one id a row."""
        width = min(-(-max(map(len, rows)) // WIDTHS) * WIDTHS, self.max_len)
        for first in range(0, len(rows), self.batch_size):
            some = range(first, min(first + self.batch_size, len(rows)))
            tokens = np.zeros((self.batch_size, width), np.int32)
            lengths = np.ones(self.batch_size, np.int32)
            for row, which in enumerate(some):
                lengths[row] = len(rows[which])
                tokens[row, : lengths[row]] = rows[which]
            yield tokens, lengths, some


@functools.cache  # a program is compiled once for a module, whatever its parameters
def scorer(module: Any) -> Any:
    """Scores continuations of rows, from the module's parameters."""

    def score(params, tokens, starts, ends):
        logits, _ = module.apply({"params": params}, tokens)
        return score_continuations(logits, tokens, starts, ends)

    return jax.jit(score)


@functools.cache
def searcher(
    module: Any,
    empty_cache: Callable[[int, int], Any],
    num_tokens: int,
    newline: int,
    num_beams: int,
    alpha: float,
) -> Any:
    """Continues rows by beam search, from the module's parameters."""

    def search(params, prompt, lengths):
        rows, width = prompt.shape

        def apply(tokens, positions, cache):
            return module.apply({"params": params}, tokens, positions, cache=cache)

        def begin(rows):
            return empty_cache(rows, width + num_tokens), jnp.zeros(rows, jnp.int32)

        def decoder(tokens, positions, state):
            cache, offset = state  # a row's last token stands at position 0 of the search
            logits, cache = apply(tokens, positions + offset[:, None], cache)
            return logits, (cache, offset)

        places = jnp.broadcast_to(jnp.arange(width), prompt.shape)
        _, cache = apply(prompt, places, begin(rows)[0])
        last = jnp.take_along_axis(prompt, lengths[:, None] - 1, axis=1)[:, 0]
        state, axes = (cache, lengths - 1), batch_axes(begin)
        found, _ = beam_search(
            decoder, state, axes, last, num_tokens, newline, num_beams=num_beams, alpha=alpha
        )
        return found[:, 0]

    return jax.jit(search)


def few_shot(
    model: Model,
    path: str,
    shots: Sequence[int],
    *,
    normalise: Normalise = "tokens",
    num_beams: int = 4,
    alpha: float = 0.6,
    seed: int = 0,
) -> dict[str, float]:
    """The share of a task that a model has right, by how many examples it is shown.

    A choice is the model's if it is the likeliest; a written answer is right if it is the task's,
    letter for letter. Where a context is too long for the model, examples are left out from its
    front.

    Args:
      model: which.
      path: of the task (`lineage_jax.data.tasks.read_task`).
      shots: numbers of examples shown, K.
      normalise: how choices are compared.
      num_beams: of the search for an answer; 4 in Brown et al. 2020, section 2.4.
      alpha: of its penalty on short answers; 0.6 there.
      seed: of the draw of examples.

    Returns:
      examples, and chance where there are choices; for each K "accuracy_K", its 95 % interval
      "accuracy_K_low" and "accuracy_K_high", and "cut_K": of how many contexts examples were left
      out.

    Raises:
      OSError, ValueError: the task cannot be read, or a prompt alone is too long for the model.
    """
    task = read_task(path)
    found: dict[str, float] = {"examples": len(task.examples)}
    if task.chosen:
        found["chance"] = float(np.mean([1 / len(one.choices) for one in task.examples]))
    room = max(len(model.tokenizer.encode(f" {one.right}\n")) for one in task.examples)
    for count in shots:
        fitted = [fit(model, task, i, count, seed, room) for i in range(len(task.examples))]
        contexts = [text for text, _ in fitted]
        if task.chosen:
            right = chosen(model, task.examples, contexts, normalise)
        else:
            wrote = model.answers(contexts, room, num_beams=num_beams, alpha=alpha)
            right = [text == one.right for text, one in zip(wrote, task.examples, strict=True)]
        low, high = interval(sum(right), len(right))
        found |= {
            f"accuracy_{count}": sum(right) / len(right),
            f"accuracy_{count}_low": low,
            f"accuracy_{count}_high": high,
            f"cut_{count}": sum(cut for _, cut in fitted),
        }
    return found


def fit(
    model: Model, task: TaskFile, which: int, num_shots: int, seed: int, room: int
) -> tuple[str, bool]:
    """The context of an example, and whether fewer than `num_shots` fit in it.

    Raises:
      ValueError: the example alone does not fit.
    """
    one = task.examples[which]
    drawn = draw_shots(len(task.examples), num_shots, which, seed)
    for left_out in range(num_shots + 1):
        text = context([task.examples[i] for i in drawn[left_out:]], one.prompt)
        if task.chosen:
            length = max(len(model.encode(f"{text} {choice}")) for choice in one.choices)
        else:
            length = len(model.encode(text)) + room
        if length <= model.max_len:
            return text, left_out > 0
    raise ValueError(
        f"{one.where}: {length} tokens with the answer are longer than the model's "
        f"max_len={model.max_len}"
    )


def chosen(
    model: Model, examples: Sequence[Example], contexts: Sequence[str], normalise: Normalise
) -> list[bool]:
    """Whether the right choice of each example is the likeliest."""
    pairs = [
        (text, f" {choice}")
        for one, text in zip(examples, contexts, strict=True)
        for choice in one.choices
    ]
    scores, counts = model.log_probs(pairs)
    if normalise == "tokens":
        scores = scores / counts
    elif normalise == "characters":
        scores = scores / [len(choice) - 1 for _, choice in pairs]
    else:
        scores = scores - model.log_probs([(UNCONDITIONAL, choice) for _, choice in pairs])[0]
    ends = np.cumsum([len(one.choices) for one in examples])
    each = np.split(scores, ends[:-1])
    return [bool(s.argmax() == one.answer) for s, one in zip(each, examples, strict=True)]


def interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): inside [0, 1], and never of width 0."""
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    whole = 1 + z * z / count
    return max(0.0, (middle - reach) / whole), min(1.0, (middle + reach) / whole)
