"""The three branches by kernels for TPU, with their gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lineage_jax.kernels.blocks import Expected
from lineage_jax.kernels.flash import clipped, flash_backward, interval_attention
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse.compressed_tpu import compressed_forward
from lineage_jax.kernels.native_sparse.config import NSAConfig, compressed_reads
from lineage_jax.kernels.native_sparse.selected_backward_tpu import selected_backward
from lineage_jax.kernels.native_sparse.selected_tpu import selected_forward
from lineage_jax.typing import Array, Float, Int


class Kernels(NamedTuple):
    """The same as `reference` and `blockwise`, on a TPU.

    Attributes:
      interpret: computes on any device, slowly, as a TPU would.
    """

    interpret: bool

    def compressed_attention(
        self,
        query: Float[Array, "B T H K"],
        keys: Float[Array, "B C G K"],
        values: Float[Array, "B C G E"],
        length: int,
        config: NSAConfig,
        reach: Intervals,
    ) -> tuple[Float[Array, "B T H E"], Int[Array, "B T G N"]]:
        """As `reference.compressed_attention`."""
        with jax.named_scope("native_sparse"):  # or "jvp" would be in the names of kernels
            return compressed(query, keys, values, reach, length, config, self.interpret)

    def selected_attention(
        self,
        query: Float[Array, "B T H K"],
        keys: Float[Array, "B S G K"],
        values: Float[Array, "B S G E"],
        blocks: Int[Array, "B T G N"],
        config: NSAConfig,
        reach: Intervals,
    ) -> Float[Array, "B T H E"]:
        """As `reference.selected_attention`."""
        with jax.named_scope("native_sparse"):
            return selected(query, keys, values, blocks, reach, config, self.interpret)

    def window_attention(
        self,
        query: Float[Array, "B T H K"],
        keys: Float[Array, "B S G K"],
        values: Float[Array, "B S G E"],
        window: int,
        reach: Intervals,
    ) -> Float[Array, "B T H E"]:
        """As `reference.window_attention`, of queries at positions one after another."""
        first = jnp.maximum(reach.first, reach.last - window + 1)
        return interval_attention(
            *(query, keys, values, first, reach.last),
            expected=Expected(diagonal=True, window=window),
            implementation="pallas_tpu_interpreted" if self.interpret else "pallas_tpu",
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def compressed(query, keys, values, reach, length, config, interpret):
    """Attended values, and the blocks that are selected."""
    options = dict(interpret=interpret)
    out, _, blocks = compressed_forward(query, keys, values, length, config, reach, **options)
    return out, blocks


def _compressed_forward(query, keys, values, reach, length, config, interpret):
    given = query, keys, values
    out, log_sum, blocks = compressed_forward(*given, length, config, reach, interpret=interpret)
    return (out, blocks), (*given, reach, out, log_sum)


def _compressed_backward(length, config, interpret, saved, grads):
    query, keys, values, reach, out, log_sum = saved
    reads = clipped(compressed_reads(reach, config), keys.shape[1])
    options = dict(expected=Expected(diagonal=True), interpret=interpret)
    found = flash_backward(query, keys, values, reads, out, log_sum, grads[0], **options)
    return *found, None


compressed.defvjp(_compressed_forward, _compressed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def selected(query, keys, values, blocks, reach, config, interpret):
    """Attended values."""
    options = dict(interpret=interpret)
    return selected_forward(query, keys, values, blocks, config, reach, **options)[0]


def _selected_forward(query, keys, values, blocks, reach, config, interpret):
    given = query, keys, values, blocks
    out, log_sum = selected_forward(*given, config, reach, interpret=interpret)
    return out, (*given, reach, out, log_sum)


def _selected_backward(config, interpret, saved, out_grad):
    *given, reach, out, log_sum = saved
    options = dict(interpret=interpret)
    found = selected_backward(*given, out, log_sum, out_grad, config, reach, **options)
    return *found, None, None


selected.defvjp(_selected_forward, _selected_backward)
