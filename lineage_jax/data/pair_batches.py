"""Batches of pairs as a pure function of the step: padded rows of similar lengths."""

import functools
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from lineage_jax.data.packing import _order
from lineage_jax.data.tokens import TokenStream

if TYPE_CHECKING:
    import grain


class PairBatches:
    """One pair a row, padded, and the batches of them at random access.

    A row of the decoder is T tokens: the start symbol and the target; its targets are the target
    and the end symbol. The start symbol is the end symbol, as in Sutskever et al. 2014, figure 1,
    where the <EOS> of the source is what the first word is predicted from. A row of the encoder is
    S tokens: the source and its end symbol. Padding is id 0, masked. Pairs that are longer are left
    out.

    `batches(step)` depends on nothing but its arguments, so that resuming needs the step alone,
    and the global batch is the same however many processes share it. Each epoch has its own order
    and every pair at most once: the fewer than B pairs that do not fill a batch sit it out.

    Pairs are grouped by length into `num_buckets` groups of equal size, and a batch holds pairs of
    one group, padded to the longest of that group: "all sentences in a minibatch are roughly of
    the same length", which Sutskever et al. 2014, section 3.4, found to double the speed. A batch
    on the border of two groups has the shape of the longer.

    With `shuffle=False` the rows come once, in order, in `num_batches` batches of one shape, of
    which the last is filled up with masked rows: an evaluation that counts every pair once.

    Args:
      source: a document for each pair, closed with its end symbol.
      target: likewise; document i translates document i of `source`.
      start: the id that the decoder begins with.
      batch_size: B, rows in a global batch.
      source_len: S, the longest source, its end symbol included.
      target_len: T, the longest target, its end symbol included.
      num_buckets: shapes that batches come in; the largest is [B, S] and [B, T].
      seed: of the order of the rows.
      shuffle: see above.

    Attributes:
      kept: the pairs that fit, in order.
      left_out: how many pairs were too long.
      lengths: S and T of each bucket, the longest last.

    Raises:
      ValueError: a size is not positive, no pair fits, or, with `shuffle`, fewer than a batch do.
    """

    def __init__(
        self,
        source: TokenStream,
        target: TokenStream,
        *,
        start: int,
        batch_size: int,
        source_len: int,
        target_len: int,
        num_buckets: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("source_len", source_len, 1),
            ("target_len", target_len, 1),
            ("buckets", num_buckets, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"wanted {name} >= {least}, came {value}")
        self.source = source
        self.target = target
        self.start = start
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._sizes = np.stack([_sizes(source), _sizes(target)], axis=1)  # pairs 2
        longest = np.array([source_len, target_len])
        self.kept = np.flatnonzero((self._sizes <= longest).all(axis=1))
        self.left_out = len(self._sizes) - len(self.kept)
        fewest = batch_size if shuffle else 1
        if len(self.kept) < fewest:
            raise ValueError(
                f"wanted at least {fewest} pairs of up to {source_len} and {target_len} tokens, "
                f"came {len(self.kept)}, and {self.left_out} that are longer; give more pairs, "
                "lower --data.batch-size, or raise --data.source-len and --data.target-len"
            )
        self._bucket, self.lengths = _buckets(self._sizes[self.kept], longest, num_buckets)
        # The order of an epoch is made once for all of its steps; of the next while both are met.
        self._rows_of_epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def num_rows(self) -> int:
        """Pairs, but those that are left out."""
        return len(self.kept)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch; without `shuffle`, those that hold every row once."""
        if self.shuffle:
            return self.num_rows // self.batch_size
        return -(-self.num_rows // self.batch_size)

    def epoch(self, step: int) -> float:
        """How often the pairs have been passed through before `step`."""
        return step / self.num_batches

    def __call__(
        self, step: int, rows: Int[np.ndarray, "b"] | None = None
    ) -> dict[str, np.ndarray]:
        """The batch of one step, or the given rows of it, such as one process's.

        Returns:
          `tokens` and `targets`, int32 [B, T], and `mask`, bool [B, T], True where the target
          counts; `source`, int32 [B, S], and `source_mask`, bool [B, S], True where a token is.
        """
        batch = self.stack(step, 1, rows)
        return {name: array[0] for name, array in batch.items()}

    def stack(
        self, first_step: int, num_steps: int, rows: Int[np.ndarray, "b"] | None = None
    ) -> dict[str, np.ndarray]:
        """The batches of several steps on end, [steps, B, T], for a scan over steps.

        All are padded to the largest shape among them.

        Raises:
          ValueError: without `shuffle`, a step is past the last batch.
        """
        if not self.shuffle and first_step + num_steps > self.num_batches:
            raise ValueError(
                f"wanted a step below {self.num_batches}, the batches of one pass, "
                f"came {first_step + num_steps - 1}"
            )
        steps = range(first_step, first_step + num_steps)
        whole = np.stack([self._rows(step) for step in steps])  # steps B
        bucket = self._bucket[whole].max() if self.shuffle else -1
        source_len, target_len = self.lengths[bucket].tolist()
        chosen = whole if rows is None else whole[:, rows]
        source, source_mask = self._padded(self.source, 0, chosen, source_len)
        targets, mask = self._padded(self.target, 1, chosen, target_len)
        tokens = np.concatenate([np.full_like(targets[..., :1], self.start), targets[..., :-1]], -1)
        return {
            "tokens": np.where(mask, tokens, 0),
            "targets": targets,
            "mask": mask,
            "source": source,
            "source_mask": source_mask,
        }

    def to_grain(self, rows: Int[np.ndarray, "b"] | None = None) -> "grain.MapDataset":
        """The same batches as an endless `grain.MapDataset`, element = step, to map or prefetch."""
        import grain

        steps = grain.MapDataset.range(2**31 if self.shuffle else self.num_batches)
        return steps.map(lambda step: self(int(step), rows))

    def _rows(self, step: int) -> Int[np.ndarray, "B"]:
        """The rows of one batch; without `shuffle`, some may be past the last."""
        if not self.shuffle:
            return np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epoch, batch = divmod(step, self.num_batches)
        return self._rows_of_epoch(epoch)[batch]

    def _draw_epoch(self, epoch: int) -> Int[np.ndarray, "batches B"]:
        """All pairs in a random order, brought together by bucket, cut, and the cuts shuffled."""
        order = _order(self.num_rows, self.seed, 2 * epoch)[: self.num_batches * self.batch_size]
        order = order[np.argsort(self._bucket[order], kind="stable")]
        batches = order.reshape(self.num_batches, self.batch_size)
        return batches[_order(self.num_batches, self.seed, 2 * epoch + 1)]

    def _padded(
        self, stream: TokenStream, side: int, rows: Int[np.ndarray, "steps B"], length: int
    ) -> tuple[Int[np.ndarray, "steps B length"], Bool[np.ndarray, "steps B length"]]:
        """The ids of some rows, with 0 behind them, and where they are."""
        pair = self.kept[np.minimum(rows, self.num_rows - 1)]
        sizes = np.where(rows < self.num_rows, self._sizes[pair, side], 0)
        column = np.arange(length)
        real = column < sizes[..., None]
        places = np.where(real, stream.starts[pair][..., None] + column, 0)
        return np.where(real, stream.ids[places], 0).astype(np.int32), real


def shapes(
    batch_size: int, source_len: int, target_len: int
) -> dict[str, tuple[tuple[int, int], type]]:
    """Shape and type of each array of a batch of pairs, the largest where there are buckets."""
    decoder, encoder = (batch_size, target_len), (batch_size, source_len)
    return {
        "tokens": (decoder, np.int32),
        "targets": (decoder, np.int32),
        "mask": (decoder, np.bool_),
        "source": (encoder, np.int32),
        "source_mask": (encoder, np.bool_),
    }


def _sizes(stream: TokenStream) -> Int[np.ndarray, "documents"]:
    """Tokens of each document, its end symbol included."""
    return np.diff(stream.starts, append=len(stream.ids))


def _buckets(
    sizes: Int[np.ndarray, "pairs 2"], longest: Int[np.ndarray, "2"], num_buckets: int
) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "buckets 2"]]:
    """The bucket of each pair, by the sum of its lengths, and the lengths that each is padded to.

    A pair may be long on one side alone; so a bucket is at least as long as those before it.
    """
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(sizes.sum(axis=1), kind="stable")] = np.arange(len(sizes))
    bucket = rank * num_buckets // len(sizes)
    lengths = np.zeros((num_buckets, 2), np.int64)
    np.maximum.at(lengths, bucket, sizes)
    lengths = np.maximum.accumulate(lengths)
    lengths[-1] = longest
    return bucket, lengths
