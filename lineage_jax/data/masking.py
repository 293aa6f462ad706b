"""Batches of text with words left out, alone or as pairs of sentences, for BERT and its children.

A row is [CLS] text [SEP], or [CLS] first [SEP] second [SEP]: Devlin et al. 2018, section 3 and
appendix A (arXiv 1810.04805); Liu et al. 2019, section 4 (arXiv 1907.11692); Lan et al. 2019,
section 3.1 (arXiv 1909.11942).
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from lineage_jax.data.tokens import TokenStream

Pairs = Literal["none", "next", "order"]
"""What a row holds: one text; a text in two parts, or the first and a part of another document
(next-sentence prediction, BERT); or a text in two parts, perhaps swapped (sentence-order, ALBERT).
"""

MASK_RATE = 0.15  # of the tokens of a row are predicted (Devlin et al., section 3.1)
MASKED, RANDOM = 0.8, 0.1  # of those become [MASK], another word; the rest stay (section 3.1)

# What a random number is for: each purpose has a stream of its own.
_ORDER, _PAIR, _MASK = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids that are no words, and how many ids there are with them.

    Attributes:
      padding: fills up a row.
      cls: opens a row.
      sep: closes each part of it.
      mask: stands for a token that is to be predicted.
      vocab_size: ids lie in [0, vocab_size).
    """

    padding: int
    cls: int
    sep: int
    mask: int
    vocab_size: int

    @property
    def ids(self) -> tuple[int, int, int, int]:
        """All four."""
        return self.padding, self.cls, self.sep, self.mask

    def __post_init__(self):
        if len(set(self.ids)) < 4 or not all(0 <= i < self.vocab_size for i in self.ids):
            raise ValueError(f"wanted four ids in [0, {self.vocab_size}), came {self.ids}")


def special_tokens_after(vocab_size: int) -> SpecialTokens:
    """Four more ids, for a tokenizer that has none, such as `ByteTokenizer`."""
    padding, cls, sep, mask = range(vocab_size, vocab_size + 4)
    return SpecialTokens(padding=padding, cls=cls, sep=sep, mask=mask, vocab_size=vocab_size + 4)


def mask_tokens(
    tokens: Int[np.ndarray, "T"],
    special: SpecialTokens,
    draws: Float[np.ndarray, "3 T"],
    mask_rate: float = MASK_RATE,
) -> tuple[Int[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
    """Leaves out a share of the words of a row (Devlin et al. 2018, section 3.1 and A.1).

    Of the words, `mask_rate` are chosen, rounded, and one at least. Each becomes [MASK] with
    probability 0.8, any word at all with 0.1, and stays as it is with 0.1.

    Args:
      tokens: of the row. Special tokens are no words.
      special: which those are.
      draws: uniform numbers in [0, 1): to choose, to decide what becomes of what is chosen, and to
        draw a word.
      mask_rate: see above.

    Returns:
      The row with words left out, and where they were chosen.
    """
    words = ~np.isin(tokens, special.ids)
    count = min(words.sum(), max(1, round(mask_rate * words.sum())))
    choosing, deciding, drawing = draws
    chosen = np.zeros_like(words)
    chosen[np.argsort(np.where(words, choosing, 1.0), kind="stable")[:count]] = True
    drawn = (drawing * (special.vocab_size - len(special.ids))).astype(np.int64)
    for one in sorted(special.ids):  # from a count of words to ids, past those that are none
        drawn += drawn >= one
    replaced = np.where(deciding < MASKED, special.mask, drawn)
    changed = chosen & (deciding < MASKED + RANDOM)
    return np.where(changed, replaced, tokens).astype(np.int32), chosen


class MaskedBatches:
    """Rows of masked text out of a stream of documents, and its batches at random access.

    Each document is cut in pieces that fill a row, and a row never holds two documents but for the
    pairs that do not belong together (without pairs: DOC-SENTENCES of Liu et al., section 4.2).
    Special tokens inside of documents, such as the end of text, are left out, and so is a last word
    by itself where there should be a pair. Pairs are cut, swapped or mixed once for all, each row
    in one way; masks are drawn once for all too (`dynamic=False`, BERT), or anew in each epoch
    (RoBERTa, section 4.1).

    As in `lineage_jax.data.packing.Batches`, `batches(step)` depends on nothing but its arguments;
    each epoch has every row once, in an order of its own; and with `shuffle=False` the rows come
    once, in order, in `num_batches` batches of which the last is filled up with rows of padding.

    Args:
      stream: the tokens.
      special: ids that are no words.
      batch_size: B, rows in a global batch.
      seq_len: T, tokens in a row, special ones included.
      pairs: what a row holds (`Pairs`).
      dynamic: see above.
      mask_rate: the share of words that are predicted.
      seed: of everything that is drawn.
      shuffle: see above.

    Raises:
      ValueError: a size is out of range, a token is no id of `special`, or there are too few
        documents for pairs or too few rows for a batch.
    """

    def __init__(
        self,
        stream: TokenStream,
        special: SpecialTokens,
        *,
        batch_size: int,
        seq_len: int,
        pairs: Pairs = "none",
        dynamic: bool = True,
        mask_rate: float = MASK_RATE,
        seed: int = 0,
        shuffle: bool = True,
    ):
        num_parts = 1 if pairs == "none" else 2
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seq_len", seq_len, 2 * num_parts + 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"wanted {name} >= {least}, came {value}")
        if not 0 < mask_rate <= 1:
            raise ValueError(f"wanted 0 < mask_rate <= 1, came {mask_rate}")
        if len(stream.ids) and int(stream.ids.max()) >= special.vocab_size:
            raise ValueError(f"wanted ids below {special.vocab_size}, came {stream.ids.max()}")
        words = [ids[~np.isin(ids, special.ids)] for ids in stream.documents]
        room = seq_len - num_parts - 1
        cuts = [
            (i, first)
            for i, ids in enumerate(words)
            for first in range(0, len(ids), room)
            if len(ids) - first >= num_parts
        ]
        self.documents = words
        self.pieces = np.array(cuts, np.int64).reshape(-1, 2)  # document, first token
        self.num_rows = len(cuts)
        if pairs == "next" and len(np.unique(self.pieces[:, 0])) < 2:
            raise ValueError("wanted two documents or more to make pairs of, came fewer")
        if self.num_rows < (batch_size if shuffle else 1):
            raise ValueError(
                f"wanted at least one batch of {batch_size} x {seq_len} tokens, came "
                f"{self.num_rows} rows; give more text, or lower the batch's sizes"
            )
        self.special = special
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.pairs = pairs
        self.dynamic = dynamic
        self.mask_rate = mask_rate
        self.seed = seed
        self.shuffle = shuffle

    @property
    def num_batches(self) -> int:
        """Batches that hold every row once."""
        return -(-self.num_rows // self.batch_size)

    def epoch(self, step: int) -> float:
        """How often the rows have been passed through before `step`."""
        return step * self.batch_size / self.num_rows

    def __call__(self, step: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The batch of one step, or the given rows of it, such as one process's.

        Returns:
          `tokens`, with words left out, and `targets`, with all of them, int32 [B, T]; `types`,
          int32 [B, T], 0 for the first part of a row and 1 for the second; `mask` and
          `target_mask`, bool [B, T], True for what is no padding, and for what is to be predicted;
          and `label`, int32 [B]: 0 if the parts belong together, one after the other as they stand,
          else 1.

        Raises:
          ValueError: without `shuffle`, the step is past the last batch.
        """
        if not self.shuffle and step >= self.num_batches:
            raise ValueError(
                f"wanted a step below {self.num_batches}, the batches of one pass, came {step}"
            )
        rows = np.arange(self.batch_size) if rows is None else rows
        epochs, within = np.divmod(step * self.batch_size + rows, self.num_rows)
        places = zip(epochs.tolist(), within.tolist(), strict=True)
        made = [self._row(epoch, place) for epoch, place in places]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    def _row(self, epoch: int, place: int) -> dict[str, np.ndarray]:
        if not self.shuffle and epoch:  # past the last row
            return self._laid_out([], 0)
        number = place
        if self.shuffle:
            number = int(_order(self.num_rows, self.seed, epoch)[place])
        row = self._laid_out(*self._parts(number))
        draws = draw(3 * self.seq_len, self.seed, _MASK, epoch * self.dynamic, number)
        draws = draws.reshape(3, -1)
        row["tokens"], row["target_mask"] = mask_tokens(
            row["targets"], self.special, draws, self.mask_rate
        )
        return row

    def _parts(self, number: int) -> tuple[list[np.ndarray], int]:
        """The texts of a row, and its label."""
        document, first = self.pieces[number]
        if self.pairs == "none":
            return [self.documents[document][first : first + self.seq_len - 2]], 0
        piece = self.documents[document][first : first + self.seq_len - 3]
        where, whether, which = draw(3, self.seed, _PAIR, 0, number)
        cut = 1 + int(where * (len(piece) - 1))
        parts, label = [piece[:cut], piece[cut:]], int(whether < 0.5)
        if label and self.pairs == "order":
            parts = parts[::-1]
        elif label:
            # Rows of a document lie side by side: any of the others, counted around it.
            begin, end = np.searchsorted(self.pieces[:, 0], (document, document + 1))
            other = (end + int(which * (self.num_rows - (end - begin)))) % self.num_rows
            document, first = self.pieces[other]
            parts[1] = self.documents[document][first : first + len(piece) - cut]
        return parts, label

    def _laid_out(self, parts: list[np.ndarray], label: int) -> dict[str, np.ndarray]:
        """Parts between special tokens, in arrays of T; without parts, all padding."""
        ids, types = [self.special.cls] if parts else [], [0] if parts else []
        for part, text in enumerate(parts):
            ids += [*text.tolist(), self.special.sep]
            types += [part] * (len(text) + 1)
        padding = self.seq_len - len(ids)
        targets = np.array(ids + [self.special.padding] * padding, np.int32)
        return {
            "tokens": targets,
            "targets": targets,
            "types": np.array(types + [0] * padding, np.int32),
            "mask": np.arange(self.seq_len) < len(ids),
            "target_mask": np.zeros(self.seq_len, np.bool_),
            "label": np.array(label, np.int32),
        }


def draw(count: int, seed: int, *purpose: int) -> Float[np.ndarray, "count"]:
    """Uniform numbers in [0, 1), a pure function of the arguments on every version of NumPy.

    The upper 53 bits of Philox's raw output (Salmon et al. 2011), which NumPy promises to keep; of
    its other distributions it does not.

    Args:
      count: how many.
      seed: of the run.
      *purpose: what for, and of which epoch and row, if there are such: each its own numbers.
    """
    what, epoch, row = (*purpose, 0, 0)[:3]
    # The first word of the counter is the place in a stream.
    generator = np.random.Philox(key=np.array([seed, what], np.uint64), counter=[0, 0, epoch, row])
    return (generator.random_raw(count) >> np.uint64(11)) * 2.0**-53


@functools.lru_cache(maxsize=8)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rows drawn from (seed, epoch)."""
    order = np.argsort(draw(num_rows, seed, _ORDER, epoch), kind="stable")
    order.flags.writeable = False
    return order


def shapes(batch_size: int, seq_len: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of each array of a batch of masked text."""
    rows = (batch_size, seq_len)
    return {
        **dict.fromkeys(("tokens", "targets", "types"), (rows, np.int32)),
        **dict.fromkeys(("mask", "target_mask"), (rows, np.bool_)),
        "label": ((batch_size,), np.int32),
    }
