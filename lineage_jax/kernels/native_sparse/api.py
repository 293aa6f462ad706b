"""Native Sparse Attention, whole and in parts, by whatever computes it best here.

Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse
Attention", section 3 (arXiv 2502.11089). A query reads all that is behind it, squeezed into blocks
(compressed), the few blocks that matter most to it as they are (selected), and the last positions
(window); a gate of each head weighs the three. `reference.py` has it written out.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from lineage_jax.kernels import flash
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse import blockwise, reference
from lineage_jax.kernels.native_sparse.config import PAPER, Branches, NSAConfig, reach
from lineage_jax.kernels.native_sparse.kernels import Kernels
from lineage_jax.typing import Array, Float, Int

IMPLEMENTATIONS: Mapping[str, Any] = {
    "reference": reference,
    "xla": blockwise,
    "pallas_tpu": Kernels("tpu", interpret=False),
    "pallas_tpu_interpreted": Kernels("tpu", interpret=True),
    "pallas_gpu": Kernels("gpu", interpret=False),
    "pallas_gpu_interpreted": Kernels("gpu", interpret=True),
}
"""By name: tables of scores; tiles of queries, in plain jnp; kernels; the same on any device,
slowly."""


def native_sparse_attention(
    query: Float[Array, "B T H K"],
    keys: Branches,
    values: Branches,
    gates: Float[Array, "B T H 3"],
    *,
    config: NSAConfig = PAPER,
    segment_ids: Int[Array, "B S"] | None = None,
    offset: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> Float[Array, "B T H E"]:
    """The three branches, each times its gate (equation 5).

    First-order gradients are those of the formula, the choice of blocks taken as given.

    Args:
      query: projected heads; query head h reads key-value head h // (H / G).
      keys, values: of each branch: [B, S, G, K] and [B, S, G, E], and C compressed ones for S
        positions (`compress`), [B, C, G, K] and [B, C, G, E].
      gates: of each query head, for the branches in their order; in [0, 1] in the paper.
      config: sizes.
      segment_ids: which document each key belongs to, its positions side by side; documents do not
        meet. One document if not given.
      offset: where the first query stands among the keys: 0 but for a prompt read in chunks.
      implementation: what computes it, of `IMPLEMENTATIONS`; if not given, kernels on a TPU or a
        GPU and tiles elsewhere.

    Raises:
      ValueError: naming what was wanted and what came, if shapes do not fit one another; for an
        implementation that is not there or cannot run here.
    """
    check(query, keys, values, gates, config, segment_ids)
    reads = reach(query, segment_ids, offset)
    return attend(query, keys, values, gates, config, reads, reads, chosen(implementation))


def attend(
    query: Float[Array, "B T H K"],
    keys: Branches,
    values: Branches,
    gates: Float[Array, "B T H 3"],
    config: NSAConfig,
    reads: Intervals,
    near: Intervals,
    parts: Any,
) -> Float[Array, "B T H E"]:
    """The three branches by one implementation, each times its gate.

    `near` is what may be read of the window's keys, where these are not all positions.
    """
    length = keys.selected.shape[1]
    compressed, blocks = parts.compressed_attention(
        query, keys.compressed, values.compressed, length, config, reads
    )
    selected = parts.selected_attention(
        query, keys.selected, values.selected, blocks, config, reads
    )
    window = parts.window_attention(query, keys.window, values.window, config.window, near)
    outs = jnp.stack([compressed, selected, window], axis=-2)  # B T H 3 E
    return jnp.einsum("bthi,bthie->bthe", gates, outs).astype(query.dtype)


def compress(
    heads: Float[Array, "B S G K"],
    squeeze: Callable[[Float[Array, "... P K"]], Float[Array, "... K"]],
    config: NSAConfig = PAPER,
) -> Float[Array, "B C G K"]:
    """One key or value for every `config.compressed_size` positions (equation 7).

    The last ones, whose positions are not all there, are made of zeros besides; no query reads
    them.

    Args:
      heads: of keys or of values.
      squeeze: what is learned: from P positions of a block to one.
      config: sizes.
    """
    stride, size = config.stride, config.compressed_size
    count = config.num_compressed(heads.shape[1])
    whole = (count - 1) * stride + size
    heads = jnp.pad(heads, ((0, 0), (0, max(0, whole - heads.shape[1])), (0, 0), (0, 0)))
    heads = heads.swapaxes(1, 2)  # B G S K
    strides = heads[:, :, : (count - 1) * stride + size]
    strides = strides.reshape(*strides.shape[:2], -1, stride, strides.shape[-1])
    shifts = [strides[:, :, i : i + count] for i in range(size // stride)]
    return squeeze(jnp.concatenate(shifts, axis=-2)).swapaxes(1, 2)


def compressed_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B C G K"],
    values: Float[Array, "B C G E"],
    length: int,
    *,
    config: NSAConfig = PAPER,
    segment_ids: Int[Array, "B S"] | None = None,
    offset: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H E"], Int[Array, "B T G N"]]:
    """Attention to compressed keys (section 3.3.1), and the blocks that it selects.

    Args:
      query: projected heads.
      keys, values: compressed.
      length: how many positions there are to select from.
      config, segment_ids, offset, implementation: as of `native_sparse_attention`.

    Returns:
      What each query attends to, and the blocks that it reads (equations 8 to 11), in order; -1
      where there are no more. The first of its document and the last up to its own are always among
      them, then those of which the compressed keys get most attention from all query heads of the
      group.
    """
    reads = reach(query, segment_ids, offset)
    parts = chosen(implementation)
    return parts.compressed_attention(query, keys, values, length, config, reads)


def select_blocks(
    query: Float[Array, "B T H K"], keys: Float[Array, "B C G K"], length: int, **options: Any
) -> Int[Array, "B T G N"]:
    """The blocks that `compressed_attention` selects, whose options it takes."""
    return compressed_attention(query, keys, keys, length, **options)[1]


def selected_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    blocks: Int[Array, "B T G N"],
    *,
    config: NSAConfig = PAPER,
    segment_ids: Int[Array, "B S"] | None = None,
    offset: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> Float[Array, "B T H E"]:
    """Attention to the positions of `blocks`, as `select_blocks` gives them (equation 12)."""
    reads = reach(query, segment_ids, offset)
    parts = chosen(implementation)
    return parts.selected_attention(query, keys, values, blocks, config, reads)


def window_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B S G K"],
    values: Float[Array, "B S G E"],
    window: int,
    *,
    segment_ids: Int[Array, "B S"] | None = None,
    offset: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> Float[Array, "B T H E"]:
    """Attention to the last positions, `window` of them, the query's own included."""
    reads = reach(query, segment_ids, offset)
    return chosen(implementation).window_attention(query, keys, values, window, reads)


def chosen(implementation: str | None) -> Any:
    """The three branches by an implementation.

    Raises:
      ValueError: naming those there are, or those that run here, if it is not one of them.
    """
    return IMPLEMENTATIONS[flash.chosen(implementation)]


def check(
    query: Array,
    keys: Branches,
    values: Branches,
    gates: Array,
    config: NSAConfig,
    segment_ids: Array | None,
) -> None:
    """Holds the shapes of one call to one another.

    Raises:
      ValueError: naming the first that does not fit.
    """
    batch, length, num_heads, width = query.shape
    _, positions, num_groups, value_width = values.selected.shape
    if num_heads % num_groups:
        raise ValueError(
            f"{num_groups} heads of keys and values must divide {num_heads} heads of queries"
        )
    lengths = Branches(config.num_compressed(positions), positions, positions)
    wanted: dict[str, tuple[tuple[int, ...], Array]]
    wanted = {"gates": ((batch, length, num_heads, len(lengths)), gates)}
    if segment_ids is not None:
        wanted["segment_ids"] = ((batch, positions), segment_ids)
    for name, count in lengths._asdict().items():
        of_keys, of_values = (getattr(x, name) for x in (keys, values))
        wanted[f"keys.{name}"] = ((batch, count, num_groups, width), of_keys)
        wanted[f"values.{name}"] = ((batch, count, num_groups, value_width), of_values)
    for name, (shape, array) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"wanted {name} of shape {shape}, got {array.shape}")
    if length > positions:
        raise ValueError(f"wanted at most as many queries as keys, {positions}, got {length}")
