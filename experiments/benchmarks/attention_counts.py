"""How often each part of attention's kernels is taken, from what the kernels are told.

A kernel's parts are those of `lineage_jax.pods.bundles.Listing`: the steps of its grid, then the
branches and loops in a step, in the order they begin. Which tiles meet, which chunks are hidden in
part and how long lists are, is computed by the same functions that tell the kernels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.splash import TILE as TILE_OF_SPLASH
from lineage_jax.kernels import PAPER
from lineage_jax.kernels.bands import MEET, WIDE, WRITE, band_of, meeting, walk
from lineage_jax.kernels.blocks import (
    FIRST,
    HIDDEN,
    LAST,
    READ,
    Blocks,
    Expected,
    cut,
    padded_reads,
    pairs_of,
)
from lineage_jax.kernels.flash import clipped
from lineage_jax.kernels.intervals import Intervals, intervals
from lineage_jax.kernels.native_sparse import compressed_tpu
from lineage_jax.kernels.native_sparse.chip_tpu import TILE
from lineage_jax.kernels.native_sparse.config import compressed_reads
from lineage_jax.kernels.native_sparse.selected_blocks_tpu import sizes

Counts = tuple[int, ...]
"""Of one call of a kernel, all its steps together."""

CLUSTER = 256
"""Positions that are alike in clustered keys and queries."""
DRAWN = 4096
"""Queries whose blocks are drawn at once: a whole number of clusters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one row; the paper's (Yuan et al. 2025, section 4.1) but for its length.

    Attributes:
      length: positions.
      heads, groups: of queries, and of keys and values.
      width, value_width: of a head of queries and keys, and of values.
      selection: "random", or "clustered": whether neighbouring queries choose the same blocks.
    """

    length: int
    heads: int = 64
    groups: int = 4
    width: int = 192
    value_width: int = 128
    selection: str = "random"

    def array(self, heads: int, width: int, length: int | None = None) -> Any:
        """Heads of all positions, or of so many."""
        return jax.ShapeDtypeStruct((1, length or self.length, heads, width), jnp.bfloat16)

    @property
    def query(self) -> Any:
        return self.array(self.heads, self.width)

    def stored(self, length: int | None = None) -> tuple[Any, Any]:
        """Keys and values."""
        widths = self.width, self.value_width
        keys, values = (self.array(self.groups, width, length) for width in widths)
        return keys, values

    @property
    def compressed(self) -> int:
        """Compressed keys."""
        return PAPER.num_compressed(self.length)

    @property
    def blocks(self) -> Any:
        """The blocks that are selected."""
        return jax.ShapeDtypeStruct((1, self.length, self.groups, PAPER.num_blocks), jnp.int32)


def counts(branch: str, shape: Shape) -> Mapping[str, list[Counts]]:
    """Of all kernels of a branch, by name, one for each call.

    Args:
      branch: "full", "splash", "compressed", "selected" or "window".
      shape: of the call.

    Raises:
      ValueError: for another branch.
    """
    at = jnp.arange(shape.length, dtype=jnp.int32)[None]
    reach, causal = Intervals(jnp.zeros_like(at), at), Expected(diagonal=True)
    if branch == "splash":
        return splash(shape)
    if branch == "full":
        reads = intervals(shape.length, shape.length)
        return flash(shape, reads, causal, shape.length)
    if branch == "window":
        reads = Intervals(jnp.maximum(at - PAPER.window + 1, 0), at)
        return window(shape, reads, dataclasses.replace(causal, window=PAPER.window))
    if branch == "compressed":
        reads = clipped(compressed_reads(reach, PAPER), shape.compressed)
        of_flash = flash(shape, reads, causal, shape.compressed)
        backward = {name: of_flash[name] for name in ("inner_products", "flash_attention_backward")}
        return {"compressed_forward": [compressed(shape, reach)], **backward}
    if branch == "selected":
        return selected(shape)
    raise ValueError(
        f"wanted a branch of full, splash, compressed, selected and window, got {branch!r}"
    )


def of_shapes(function: Callable[..., Any], *shapes: Any) -> Any:
    """What a function makes of arrays that it only asks for their shapes."""
    found = []
    jax.eval_shape(lambda *arrays: found.append(function(*arrays)), *shapes)
    return found[0]


class Met(NamedTuple):
    """Steps of a list of pairs of tiles, of one head.

    Attributes:
      steps: all.
      first: of them, the first of its tile of queries.
      whole, masked: those in which every score is read, and some are hidden; the rest do nothing.
      last: the last of its tile of queries.
    """

    steps: int
    first: int
    whole: int
    masked: int
    last: int


def met(blocks: Blocks, reads: Intervals, chunk: int | None = None) -> Met:
    """Of all keys, or a chunk of them."""
    size = () if chunk is None else (chunk, blocks.chunk)
    pairs = pairs_of(blocks, reads, *size)
    code, seen = np.asarray(pairs.codes), np.asarray(pairs.codes) & (READ | HIDDEN)
    flags = (code & FIRST > 0, seen == READ, seen == READ | HIDDEN, code & LAST > 0)
    return Met(int(pairs.steps), *(int(flag.sum()) for flag in flags))


def flash(
    shape: Shape, reads: Intervals, expected: Expected, num_keys: int
) -> dict[str, list[Counts]]:
    """Of flash attention by intervals, forward and backward."""
    keys, values = shape.stored(num_keys)
    b = cut(shape.query.shape, keys.shape, values.shape[-1], expected)
    whole, ends = padded_reads(b, reads), b.batch * b.groups
    chunks = [None] if b.chunks == 1 else list(range(b.chunks))
    backward = []
    for chunk in chunks:
        steps, *tiles = (b.batch * b.heads * n for n in met(b, whole, chunk))
        backward.append((steps, ends, *tiles, ends))
    return {
        "flash_attention_forward": [tuple(b.batch * b.heads * n for n in met(b, whole))],
        "inner_products": [(b.batch * b.heads * b.num_rows,)],
        "flash_attention_backward": backward,
    }


def window(shape: Shape, reads: Intervals, expected: Expected) -> dict[str, list[Counts]]:
    """Of a window: a tile of queries meets all its keys at once, as many as usual or some more."""
    keys, values = shape.stored()
    arrays = shape.query.shape, keys.shape, values.shape[-1], expected
    found = flash(shape, reads, expected, shape.length)
    if b := band_of(*arrays, lists=1):
        wide = np.asarray(meeting(b, b.padded(reads)).wide)
        kinds = [(~wide).sum(), wide.sum()] if b.wide > b.columns else []
        heads = b.batch * b.heads // b.together
        found["window_forward"] = [tuple(heads * int(n) for n in (wide.size, *kinds))]
    if b := band_of(*arrays, lists=1, backward=True):
        steps = walk(b, b.padded(reads))
        code = np.asarray(steps.codes)
        meets, wide = code & MEET > 0, code & WIDE > 0
        kinds = [(meets & ~wide).sum(), wide.sum()] if b.wide > b.columns else [meets.sum()]
        heads = b.batch * b.heads // b.together
        often = steps.steps, 1, *kinds, (code & WRITE > 0).sum()
        found["window_backward"] = [tuple(heads * int(n) for n in often)]
    return found


def compressed(shape: Shape, reach: Intervals) -> Counts:
    """Of the compressed branch, forward: a tile of queries meets chunks of keys."""
    arrays = shape.query, *shape.stored(shape.compressed)
    c = of_shapes(lambda q, k, v: compressed_tpu.chunks(q, k, v, shape.length, PAPER), *arrays)
    tiles = np.asarray(compressed_tpu.told(reach, shape.compressed, PAPER, c)[0])
    low, high, whole_low, whole_high = tiles
    ends = np.minimum(high, whole_high) - np.maximum(low, whole_low)
    met, whole = np.maximum(high - low, 0).sum(), np.maximum(ends, 0).sum()
    often = tiles.shape[1], (low < high).sum(), met, whole, met - whole, met
    return tuple(c.groups * int(n) for n in (*often, PAPER.num_blocks * met))


def selected(shape: Shape) -> dict[str, list[Counts]]:
    """Of the selected branch: every query meets its blocks, and every block its queries."""
    arrays = shape.query, *shape.stored(), shape.blocks
    s = of_shapes(lambda q, k, v, blocks: sizes(q, k, v, blocks, PAPER), *arrays)
    heads, chosen = s.batch * s.groups, chosen_blocks(shape)
    steps = heads * s.length // TILE
    found = np.bincount(chosen[chosen >= 0], minlength=s.count)
    lists = np.maximum(-(-found // TILE), 1).sum()  # a block that nobody chose has one too
    return {
        "selected_forward": [(steps,)],
        "selected_backward_queries": [(steps,)],
        "selected_backward_keys": [(heads * s.count, heads, heads * int(lists))],
    }


def splash(shape: Shape) -> dict[str, list[Counts]]:
    """Of splash attention, causal: its grid has all pairs of tiles, of which it computes some."""
    n = -(-shape.length // TILE_OF_SPLASH)
    pairs, heads = n * (n + 1) // 2, shape.heads
    by_queries: list[Counts] = [(heads * n * n, heads * n, heads * pairs, heads * n)]
    by_keys: list[Counts] = [(heads * n * n, shape.groups * n, heads * pairs, shape.groups * n)]
    return {
        "splash_mqa_fwd_residuals": by_queries,
        "splash_mqa_dkv_no_residuals": by_keys,
        "splash_mqa_dq_no_residuals": by_queries,
    }


def chosen_blocks(shape: Shape) -> np.ndarray:
    """Blocks that each query of one group selects [T, N], -1 where there are no more.

    The first one and the local ones as the kernels always do, the others drawn: for each query, or
    for clustered selections for some queries one after another.
    """
    rng, own = np.random.default_rng(0), np.arange(shape.length) // PAPER.block_size
    each = CLUSTER if shape.selection == "clustered" else 1
    block, found = np.arange(PAPER.num_selectable(shape.length)), []
    for begin in range(0, shape.length, DRAWN):
        mine = own[begin : begin + DRAWN, None]
        worth = rng.random((-(-len(mine) // each), len(block)), np.float32)
        worth = np.repeat(worth, each, 0)[: len(mine)]
        always = (block < PAPER.num_first) | (block > mine - PAPER.num_local)
        worth[always] = 2
        worth[block > mine] = -1
        best = np.argpartition(-worth, min(PAPER.num_blocks, len(block)) - 1, 1)
        best = best[:, : PAPER.num_blocks]
        readable = np.take_along_axis(worth, best, 1) >= 0
        found.append(np.where(readable, best, -1))
    return np.concatenate(found)
