"""Text without labels as pairs of source and target: span corruption, and what it is compared with.

Raffel et al. 2019 (T5), sections 3.1.4 and 3.3. https://arxiv.org/abs/1910.10683
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Int, Integer

from lineage_jax.data.packing import _order
from lineage_jax.data.tokens import TokenStream

if TYPE_CHECKING:
    import grain

Objective = Literal["span_corruption", "reconstruction", "prefix_lm", "lm"]
"""What source and target are made of a text of L tokens; an end symbol closes either.

    span_corruption  the text with a sentinel in the place of each span of noise; those spans, with
                     a sentinel in the place of each stretch of text that is kept (figure 2)
    reconstruction   the text with tokens masked as BERT's are; the whole text (section 3.3.1)
    prefix_lm        the text up to a random place; the rest (section 3.3.1)
    lm               nothing; the whole text (section 3.2.3)
"""

DENSITY, SPAN_LEN = 0.15, 3.0
"""The part of a text that is noise, and the mean length of a span, in tokens (section 3.7)."""

RANDOM_RATE = 0.1
"""The part of the noise that becomes a random token and not the mask (section 3.3.1)."""


def noise_counts(
    text_len: int, noise_density: float = DENSITY, mean_span_len: float = SPAN_LEN
) -> tuple[int, int]:
    """How many tokens of a text are noise, and in how many spans: the same for every text.

    Section 3.3.4: 15% of 500 tokens in 25 spans are spans of 3 on average. There is at least one
    token of noise and one that is kept, and as many stretches of text as spans.

    Args:
      text_len: L, tokens, at least 2.
      noise_density: the part of them that is noise, in (0, 1).
      mean_span_len: mean length of a span, in tokens.
    """
    noise = min(max(round(text_len * noise_density), 1), text_len - 1)
    return noise, min(max(round(noise / mean_span_len), 1), text_len - noise)


def lengths(
    text_len: int, noise_density: float = DENSITY, mean_span_len: float = SPAN_LEN
) -> tuple[int, int]:
    """Tokens of the source and of the target of a text under span corruption.

    Either has a sentinel for each span, and its end symbol.

    Args:
      text_len, noise_density, mean_span_len: as `noise_counts` has them.
    """
    noise, spans = noise_counts(text_len, noise_density, mean_span_len)
    return text_len - noise + spans + 1, noise + spans + 1


def row_lengths(
    objective: Objective,
    text_len: int,
    noise_density: float = DENSITY,
    mean_span_len: float = SPAN_LEN,
) -> tuple[int, int]:
    """Tokens of a row's source and target, S and T, for texts of L tokens."""
    return {
        "span_corruption": lengths(text_len, noise_density, mean_span_len),
        "reconstruction": (text_len + 1, text_len + 1),
        "prefix_lm": (text_len, text_len),
        "lm": (1, text_len + 1),
    }[objective]


def longest_text(
    source_len: int, noise_density: float = DENSITY, mean_span_len: float = SPAN_LEN
) -> int:
    """Tokens of the longest text whose source under span corruption has at most `source_len`.

    The source never shrinks as the text grows: a token more is noise or is kept, and is followed by
    one sentinel more at most.

    Raises:
      ValueError: if not even a text of two tokens has one so short.
    """
    if lengths(2, noise_density, mean_span_len)[0] > source_len:
        raise ValueError(f"wanted a source of at least 3 tokens, came {source_len}")
    text_len = 2
    while lengths(text_len + 1, noise_density, mean_span_len)[0] <= source_len:
        text_len += 1
    return text_len


def random_spans(
    text_len: int,
    bits: np.random.Philox,
    noise_density: float = DENSITY,
    mean_span_len: float = SPAN_LEN,
) -> Bool[np.ndarray, "L"]:
    """True where a text is noise: stretches kept and spans of noise in turn, the first one kept.

    Of all ways to divide noise and what is kept into so many parts, none of them empty, each is as
    likely; so lengths of source and target are those of every other text. As the authors' code has
    it, the last token is always noise: of a text so short that it has one span, that is its end.

    Args:
      text_len, noise_density, mean_span_len: as `noise_counts` has them.
      bits: what is random.
    """
    noise, spans = noise_counts(text_len, noise_density, mean_span_len)

    def parts(total: int) -> Int[np.ndarray, "spans"]:
        order = np.argsort(bits.random_raw(total - 1), kind="stable")
        borders = 1 + np.sort(order[: spans - 1])
        return np.diff(np.concatenate([[0], borders, [total]]))

    in_turn = np.stack([parts(text_len - noise), parts(noise)], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, in_turn)


def spans_replaced(
    text: Int[np.ndarray, "L"],
    spans: Bool[np.ndarray, "L"],
    sentinels: Int[np.ndarray, "sentinels"],
) -> Int[np.ndarray, "M"]:
    """The text with the i-th of some spans replaced by the i-th sentinel (section 3.1.4, figure 2).

    Of noise it is a source, and of what is not noise a target.

    Args:
      text: ids.
      spans: True for tokens of a span; those side by side are one.
      sentinels: at least as many ids as there are spans.
    """
    opens = spans & ~np.concatenate([[False], spans[:-1]])
    marked = np.where(opens, sentinels[np.maximum(np.cumsum(opens) - 1, 0)], text)
    return marked[opens | ~spans]


def masked(
    text: Int[np.ndarray, "L"],
    bits: np.random.Philox,
    mask: int,
    others: Integer[np.ndarray, "V"],
    noise_density: float = DENSITY,
) -> Int[np.ndarray, "L"]:
    """The text with each token hidden at that rate: by the mask, or by any other token.

    Section 3.3.1: 90% of what is hidden by the mask, 10% by a token drawn from the vocabulary.

    Args:
      text: ids.
      bits: what is random.
      mask: its id.
      others: ids that a random token is drawn from.
      noise_density: the part that is hidden.
    """
    hidden, random = (bits.random_raw(len(text)) * 2.0**-64 for _ in range(2))
    drawn = others[bits.random_raw(len(text)) % np.uint64(len(others))]
    return np.where(hidden < noise_density, np.where(random < RANDOM_RATE, drawn, mask), text)


class DenoisingBatches:
    """Pairs made of a stream of tokens, and the batches of them at random access.

    The stream is cut in texts of L tokens, documents one after another as they are there, each with
    its end of text; the rest at the end, shorter than L, is left out. Each text makes one pair
    (`Objective`), a row of a batch, as `PairBatches` has it: the source and the end symbol; the
    start symbol and the target, whose targets are the target and the end symbol. All of a batch
    are of one shape; what is shorter has id 0 behind it, masked.

    `batches(step)` depends on nothing but its arguments and the seed. Each epoch has every text
    once, in an order of its own and with noise of its own; batches run on over its end. With
    `shuffle=False` texts come once, in order, in `num_batches` batches of which the last is filled
    up with masked rows.

    Args:
      stream: the tokens.
      objective: what the pairs are.
      batch_size: B, rows in a global batch.
      text_len: L, tokens of a text; `longest_text` makes most of a source's length.
      vocab_size: ids there are, sentinels included.
      start: the id that the decoder begins with; padding's, 0, as released.
      end: the id that closes source and target.
      sentinels: ids, none of which is in the text: the first is the mask of reconstruction. As many
        as are needed, from the top of the vocabulary downwards, if not given: as released, where
        <extra_id_0> is the highest id.
      noise_density: the part of a text that is noise.
      mean_span_len: mean length of a span of noise, in tokens.
      seed: of the order of the texts, and of the noise.
      shuffle: see above.

    Attributes:
      source_len, target_len: S and T, tokens of a row.
      num_rows: texts.

    Raises:
      ValueError: a size or a rate is out of its range; there are too few texts, or too few
        sentinels; or an id of the stream is a sentinel or beyond the vocabulary.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        objective: Objective = "span_corruption",
        batch_size: int,
        text_len: int,
        vocab_size: int,
        start: int,
        end: int,
        sentinels: Sequence[int] | None = None,
        noise_density: float = DENSITY,
        mean_span_len: float = SPAN_LEN,
        seed: int = 0,
        shuffle: bool = True,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("text_len", text_len, 2),
            ("mean_span_len", mean_span_len, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"wanted {name} >= {least}, came {value}")
        if not 0 < noise_density < 1:
            raise ValueError(f"wanted 0 < noise_density < 1, came {noise_density}")
        self.num_rows = stream.num_tokens // text_len
        fewest = batch_size if shuffle else 1
        if self.num_rows < fewest:
            raise ValueError(
                f"wanted at least {fewest} texts of {text_len} tokens, came {stream.num_tokens} "
                f"tokens, {self.num_rows} texts; give more text, or lower the batch or the texts"
            )
        self.stream = stream
        self.objective = objective
        self.batch_size = batch_size
        self.text_len = text_len
        self.start = start
        self.end = end
        self.noise_density = noise_density
        self.mean_span_len = mean_span_len
        self.seed = seed
        self.shuffle = shuffle
        self.source_len, self.target_len = row_lengths(
            objective, text_len, noise_density, mean_span_len
        )
        needed = {
            "span_corruption": noise_counts(text_len, noise_density, mean_span_len)[1],
            "reconstruction": 1,
        }.get(objective, 0)
        if sentinels is None:
            sentinels = range(vocab_size - 1, vocab_size - 1 - needed, -1)
        self.sentinels = np.array(sentinels, np.int32)
        _check_ids(stream, self.sentinels, vocab_size, needed)
        self._others = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), self.sentinels)

    @property
    def num_batches(self) -> int:
        """Batches that hold every text once."""
        return -(-self.num_rows // self.batch_size)

    def epoch(self, step: int) -> float:
        """How often the texts have been passed through before `step`."""
        return step * self.batch_size / self.num_rows

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
        pairs = [[self._pair(int(place)) for place in step] for step in first[:, None] + rows]
        source, source_mask = _padded([[one for one, _ in step] for step in pairs], self.source_len)
        targets, mask = _padded([[two for _, two in step] for step in pairs], self.target_len)
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

    def _pair(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target at a place of the run of epochs; past a single pass, nothing."""
        epoch, row = divmod(place, self.num_rows)
        if self.shuffle:
            row = int(_order(self.num_rows, self.seed, epoch)[row])
        elif epoch:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        text = self.stream.ids[row * self.text_len : (row + 1) * self.text_len].astype(np.int32)
        # Each text counts from a place of its own, all of them beyond where the order counts.
        counter = np.array([0, row, 1, 0], np.uint64)
        bits = np.random.Philox(key=np.array([self.seed, epoch], np.uint64), counter=counter)
        source, target = self._corrupted(text, bits)
        return np.append(source, np.int32(self.end)), np.append(target, np.int32(self.end))

    def _corrupted(
        self, text: Int[np.ndarray, "L"], bits: np.random.Philox
    ) -> tuple[np.ndarray, np.ndarray]:
        """Source and target without their end symbols."""
        if self.objective == "span_corruption":
            noise = random_spans(self.text_len, bits, self.noise_density, self.mean_span_len)
            replaced = functools.partial(spans_replaced, text, sentinels=self.sentinels)
            return replaced(noise), replaced(~noise)
        if self.objective == "reconstruction":
            mask = int(self.sentinels[0])
            return masked(text, bits, mask, self._others, self.noise_density), text
        cut = 0
        if self.objective == "prefix_lm":
            cut = 1 + int(bits.random_raw() % (self.text_len - 1))
        return text[:cut], text[cut:]


def _padded(
    rows: list[list[np.ndarray]], length: int
) -> tuple[Int[np.ndarray, "steps B length"], Bool[np.ndarray, "steps B length"]]:
    """Rows of ids, with 0 behind them, and where they are."""
    sizes = np.array([[len(row) for row in step] for step in rows])
    real = np.arange(length) < sizes[..., None]
    padded = np.zeros(real.shape, np.int32)
    padded[real] = np.concatenate([row for step in rows for row in step])
    return padded, real


def _check_ids(
    stream: TokenStream, sentinels: Int[np.ndarray, "sentinels"], vocab_size: int, needed: int
) -> None:
    """Refuses sentinels that are too few, twice there, or text; and ids beyond the vocabulary."""
    if len(sentinels) < needed:
        raise ValueError(f"wanted {needed} sentinels, one for each span, came {len(sentinels)}")
    if len(np.unique(sentinels)) < len(sentinels):
        raise ValueError("wanted sentinels that differ, came one twice")
    if len(sentinels) and not (sentinels.min() >= 0 and sentinels.max() < vocab_size):
        raise ValueError(
            f"wanted sentinels in [0, {vocab_size}), came {sentinels.min()} to {sentinels.max()}"
        )
    if (top := int(stream.ids.max())) >= vocab_size:
        raise ValueError(f"wanted ids of text below vocab_size={vocab_size}, came {top}")
    if (met := np.isin(sentinels, stream.ids)).any():
        raise ValueError(f"wanted a text without sentinels, came id {sentinels[met][0]} in it")
