"""Batches as a pure function of the step: rows cut from a token stream, shuffled by epoch."""

import functools
from typing import TYPE_CHECKING

import numpy as np

from lineage_jax.data.tokens import TokenStream

if TYPE_CHECKING:
    import grain


class Batches:
    """Concatenate-and-cut packing of a stream, and its batches at random access.

    The stream is cut in rows of T + 1 tokens that overlap by one: T inputs, and T targets one
    token later. So every token but the very first is a target exactly once an epoch. Documents
    that meet in a row are told apart by `segment_ids` 1, 2, ... in which attention is to stay; a
    document cut by the end of a row goes on in the next row as a segment of its own, with
    positions from 0. A document is not predicted from the one before: a target that opens a
    document is masked. The last row is filled up with segment 0, masked.

    `batches(step)` depends on nothing but its arguments, so that resuming needs the step alone,
    and the global batch is the same however many processes share it. Batches run on over the end
    of an epoch: each epoch has every row once, in an order of its own.

    With `shuffle=False` the rows come once, in order, in `num_batches` batches of which the last
    is filled up with masked rows: an evaluation that counts every target exactly once.

    Args:
      stream: the tokens.
      batch_size: B, rows in a global batch.
      seq_len: T, tokens in a row.
      seed: of the order of the rows.
      shuffle: see above.

    Raises:
      ValueError: a size is not positive, the stream has nothing to predict, or, with `shuffle`,
        it has fewer rows than a batch.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        shuffle: bool = True,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seq_len", seq_len, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"wanted {name} >= {least}, came {value}")
        if stream.num_targets < 1:
            raise ValueError(
                f"wanted at least two tokens in a document, came {stream.num_tokens} "
                f"tokens in {len(stream.starts)} documents"
            )
        self.stream = stream
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.num_rows = -(-(stream.num_tokens - 1) // seq_len)
        if shuffle and self.num_rows < batch_size:
            raise ValueError(
                f"wanted at least one batch of {batch_size} x {seq_len} tokens, came "
                f"{stream.num_tokens} tokens, {self.num_rows} rows; give more text, or lower "
                "--data.batch-size or --data.seq-len"
            )

    @property
    def num_batches(self) -> int:
        """Batches that hold every row once."""
        return -(-self.num_rows // self.batch_size)

    @property
    def tokens_per_batch(self) -> int:
        """B T, padding included."""
        return self.batch_size * self.seq_len

    def epoch(self, step: int) -> float:
        """How often the stream has been passed through before `step`."""
        return step * self.batch_size / self.num_rows

    def __call__(self, step: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The batch of one step, or the given rows of it, such as one process's.

        Returns:
          `tokens`, `targets`, `positions`, `segment_ids`, int32 [B, T], and `mask`, bool [B, T],
          True where the target counts.
        """
        batch = self.stack(step, 1, rows)
        return {name: array[0] for name, array in batch.items()}

    def stack(
        self, first_step: int, num_steps: int, rows: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The batches of several steps on end, [S, B, T], for a scan over steps.

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
        places = first[:, None] + rows  # S B
        cut = self._cut(self._rows(places.ravel()) if self.shuffle else places.ravel())
        shape = (*places.shape, self.seq_len)
        return {name: array.reshape(shape) for name, array in cut.items()}

    def to_grain(self, rows: np.ndarray | None = None) -> "grain.MapDataset":
        """The same batches as an endless `grain.MapDataset`, element = step, to map or prefetch."""
        import grain

        steps = grain.MapDataset.range(2**31 if self.shuffle else self.num_batches)
        return steps.map(lambda step: self(int(step), rows))

    def _rows(self, places: np.ndarray) -> np.ndarray:
        """The row at each place of the endless run of epochs."""
        epochs, within = np.divmod(places, self.num_rows)
        rows = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _order(self.num_rows, self.seed, int(epoch))[within[here]]
        return rows

    def _cut(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Cuts rows [R] out of the stream; a row past the last is all padding."""
        ids, starts = self.stream.ids, self.stream.starts
        first = rows[:, None] * self.seq_len  # R 1
        place = first + np.arange(self.seq_len + 1)  # R T+1
        real = (place < len(ids)) & (rows < self.num_rows)[:, None]
        place = np.minimum(place, len(ids) - 1)
        tokens = np.where(real, ids[place], 0).astype(np.int32)
        document = np.searchsorted(starts, place, side="right") - 1
        positions = place - np.maximum(starts[document], first)
        segments = document - document[:, :1] + 1
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.where(real, positions, 0).astype(np.int32)[:, :-1],
            "segment_ids": np.where(real, segments, 0).astype(np.int32)[:, :-1],
            "mask": real[:, 1:] & (document[:, 1:] == document[:, :-1]),
        }


def shapes(batch_size: int, seq_len: int) -> dict[str, tuple[tuple[int, int], type]]:
    """Shape and type of each array of a batch of packed text."""
    integers = ("tokens", "targets", "positions", "segment_ids")
    types: dict[str, type] = {**dict.fromkeys(integers, np.int32), "mask": np.bool_}
    return {name: ((batch_size, seq_len), dtype) for name, dtype in types.items()}


@functools.lru_cache(maxsize=8)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rows drawn from (seed, epoch).

    It sorts raw bits of Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405):
    NumPy promises that they stay the same across versions, and of `permutation` it does not, and
    a run must meet the same rows when it is resumed after an upgrade. Not grain's shuffle, which
    seeds epoch e by seed + e: there the second epoch of seed 0 is the first of seed 1.
    """
    key = np.array([seed, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")
    order.flags.writeable = False
    return order
