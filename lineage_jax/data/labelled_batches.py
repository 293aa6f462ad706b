"""Batches of labelled texts as a pure function of the step: padded rows between marks.

Rows are those of Radford et al. 2018 (GPT-1), section 3.3 and figure 1, and of Devlin et al. 2018
(BERT), section 4: a mark that opens the row, a text, perhaps another mark and a second text, and a
mark that closes it.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Integer

from lineage_jax.data.packing import _order
from lineage_jax.data.tokenizers import Tokenizer
from lineage_jax.data.tokens import join

if TYPE_CHECKING:
    import grain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marks:
    """Ids around the texts of a row.

    Attributes:
      start: opens a row: <s> of GPT-1, [CLS] of BERT.
      between: parts two texts: $ of GPT-1, [SEP] of BERT.
      end: closes a row: <e> of GPT-1, from which it is classified; [SEP] of BERT.
      padding: fills up a row; masked.
    """

    start: int
    between: int
    end: int
    padding: int = 0


def end_of_text_marks(tokenizer: Tokenizer) -> Marks:
    """The end of text in all places, for a model that has no mark of its own."""
    end = tokenizer.end_of_text
    return Marks(start=end, between=end, end=end)


def lay_out(
    texts: Sequence[Integer[np.ndarray, "_"]], marks: Marks, seq_len: int
) -> tuple[Int[np.ndarray, "T"], int]:
    """One row, without padding, and where its second text begins, or would after its end.

    What does not fit is cut from the end of the longer text, token by token, as the released BERT
    cuts pairs.

    Args:
      texts: ids of one text or two.
      marks: ids around them.
      seq_len: tokens in a row at most, marks included.
    """
    room = seq_len - len(texts) - 1
    first, *others = texts
    if others and len(first) + len(others[0]) > room:
        others = [others[0][: max(room // 2, room - len(first))]]
    first = first[: room - sum(map(len, others))]
    row = np.concatenate([[marks.start], first, *([marks.between, *one] for one in others)])
    begins = len(first) + 2
    return np.append(row, marks.end).astype(np.int32), begins


def both_orders(
    first: Integer[np.ndarray, "_"], second: Integer[np.ndarray, "_"], marks: Marks, seq_len: int
) -> list[Int[np.ndarray, "T"]]:
    """Two rows of a pair that has no order, one in each (GPT-1, section 3.3, similarity)."""
    return [lay_out(pair, marks, seq_len)[0] for pair in ((first, second), (second, first))]


def choices(
    context: Integer[np.ndarray, "_"],
    answers: Sequence[Integer[np.ndarray, "_"]],
    marks: Marks,
    seq_len: int,
) -> list[Int[np.ndarray, "T"]]:
    """A row for each answer that may follow a context (GPT-1, section 3.3, question answering)."""
    return [lay_out((context, answer), marks, seq_len)[0] for answer in answers]


class LabelledBatches:
    """A text or a pair of texts a row, padded, with its label, and batches at random access.

    `batches(step)` depends on nothing but its arguments, so that resuming needs the step alone,
    and the global batch is the same however many processes share it. Batches run on over the end
    of an epoch: each epoch has every row once, in an order of its own.

    With `shuffle=False` the rows come once, in order, in `num_batches` batches of which the last
    is filled up with rows of padding.

    Args:
      texts: ids of the one text or two of each example.
      labels: of each example, in [0, number of labels).
      marks: ids around the texts.
      batch_size: B, rows in a global batch.
      seq_len: T, tokens in a row.
      seed: of the order of the rows.
      shuffle: see above.

    Attributes:
      cut: how many examples were longer than a row.

    Raises:
      ValueError: a size is not positive, or there are fewer examples than rows in a batch.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[Integer[np.ndarray, "_"]]],
        labels: Sequence[int],
        marks: Marks,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        shuffle: bool = True,
    ):
        num_texts = max(map(len, texts), default=1)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seq_len", seq_len, 2 * num_texts + 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"wanted {name} >= {least}, came {value}")
        if len(labels) < (batch_size if shuffle else 1):
            raise ValueError(
                f"wanted at least one batch of {batch_size} examples, came {len(labels)}; give "
                "more, or lower --data.batch-size"
            )
        rows = [lay_out(example, marks, seq_len) for example in texts]
        whole = [sum(map(len, example)) + len(example) + 1 for example in texts]
        self.cut = sum(size > seq_len for size in whole)
        self.stream = join([ids for ids, _ in rows], 2**31, None)
        self.labels = np.array(labels, np.int32)
        self.marks = marks
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self._sizes = np.array([len(ids) for ids, _ in rows])
        self._second = np.array([second for _, second in rows])

    @property
    def num_rows(self) -> int:
        """Examples."""
        return len(self.labels)

    @property
    def num_batches(self) -> int:
        """Batches that hold every row once."""
        return -(-self.num_rows // self.batch_size)

    def epoch(self, step: int) -> float:
        """How often the examples have been passed through before `step`."""
        return step * self.batch_size / self.num_rows

    def __call__(
        self, step: int, rows: Int[np.ndarray, "b"] | None = None
    ) -> dict[str, np.ndarray]:
        """The batch of one step, or the given rows of it, such as one process's.

        Returns:
          `tokens`, int32 [B, T]; `types`, int32 [B, T], 1 for the second text and the mark that
          closes it and else 0; `mask`, bool [B, T], False for padding; `label`, int32 [B].
        """
        return {name: array[0] for name, array in self.stack(step, 1, rows).items()}

    def stack(
        self, first_step: int, num_steps: int, rows: Int[np.ndarray, "b"] | None = None
    ) -> dict[str, np.ndarray]:
        """The batches of several steps on end, [steps, B, T], for a scan over steps.

        Raises:
          ValueError: without `shuffle`, a step is past the last batch.
        """
        if not self.shuffle and first_step + num_steps > self.num_batches:
            raise ValueError(
                f"wanted a step below {self.num_batches}, the batches of one pass, "
                f"came {first_step + num_steps - 1}"
            )
        rows = np.arange(self.batch_size) if rows is None else rows
        first = np.arange(first_step, first_step + num_steps) * self.batch_size
        places = first[:, None] + rows  # steps B
        real = self.shuffle | (places < self.num_rows)
        chosen = self._in_order(places) if self.shuffle else np.minimum(places, self.num_rows - 1)
        column = np.arange(self.seq_len)
        mask = (column < self._sizes[chosen][..., None]) & real[..., None]  # steps B T
        starts = self.stream.starts[chosen][..., None]
        ids = self.stream.ids[np.where(mask, starts + column, 0)]
        return {
            "tokens": np.where(mask, ids, self.marks.padding).astype(np.int32),
            "types": (mask & (column >= self._second[chosen][..., None])).astype(np.int32),
            "mask": mask,
            "label": np.where(real, self.labels[chosen], 0).astype(np.int32),
        }

    def to_grain(self, rows: Int[np.ndarray, "b"] | None = None) -> "grain.MapDataset":
        """The same batches as an endless `grain.MapDataset`, element = step, to map or prefetch."""
        import grain

        steps = grain.MapDataset.range(2**31 if self.shuffle else self.num_batches)
        return steps.map(lambda step: self(int(step), rows))

    def _in_order(self, places: Integer[np.ndarray, "steps B"]) -> Integer[np.ndarray, "steps B"]:
        """The example at each place of the endless run of epochs."""
        epochs, within = np.divmod(places, self.num_rows)
        chosen = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = _order(self.num_rows, self.seed, int(epoch))[within[here]]
        return chosen


def shapes(batch_size: int, seq_len: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of each array of a batch of labelled texts."""
    rows = (batch_size, seq_len)
    return {
        "tokens": (rows, np.int32),
        "types": (rows, np.int32),
        "mask": (rows, np.bool_),
        "label": ((batch_size,), np.int32),
    }
