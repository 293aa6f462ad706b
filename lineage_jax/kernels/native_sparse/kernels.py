"""The three branches by kernels, with their gradients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lineage_jax.kernels import flash
from lineage_jax.kernels.blocks import Expected
from lineage_jax.kernels.intervals import Intervals
from lineage_jax.kernels.native_sparse import (
    compressed_gpu,
    compressed_tpu,
    selected_backward_gpu,
    selected_backward_tpu,
    selected_gpu,
    selected_tpu,
)
from lineage_jax.kernels.native_sparse.config import NSAConfig, compressed_reads
from lineage_jax.typing import Array, Float, Int


class Passes(NamedTuple):
    """The kernels for one kind of chip.

    Attributes:
      compressed_forward, selected_forward, selected_backward: functions of the same arguments and
        results, whatever the chip.
    """

    compressed_forward: Callable[..., Any]
    selected_forward: Callable[..., Any]
    selected_backward: Callable[..., Any]


PASSES = {
    "tpu": Passes(
        compressed_tpu.compressed_forward,
        selected_tpu.selected_forward,
        selected_backward_tpu.selected_backward,
    ),
    "gpu": Passes(
        compressed_gpu.compressed_forward,
        selected_gpu.selected_forward,
        selected_backward_gpu.selected_backward,
    ),
}
"""By the chip."""


class Kernels(NamedTuple):
    """The same as `reference` and `blockwise`, on a TPU or a GPU.

    Attributes:
      chip: of `PASSES`.
      interpret: computes on any device, slowly, as the chip would.
    """

    chip: str
    interpret: bool

    @property
    def name(self) -> flash.Implementation:
        """Of the implementation of attention in general."""
        name: Any = f"pallas_{self.chip}" + ("_interpreted" if self.interpret else "")
        return name

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
            return compressed(query, keys, values, reach, length, config, self)

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
            return selected(query, keys, values, blocks, reach, config, self)

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
        return flash.interval_attention(
            *(query, keys, values, first, reach.last),
            expected=Expected(diagonal=True, window=window),
            implementation=self.name,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def compressed(query, keys, values, reach, length, config, kernels):
    """Attended values, and the blocks that are selected."""
    forward, options = PASSES[kernels.chip].compressed_forward, dict(interpret=kernels.interpret)
    out, _, blocks = forward(query, keys, values, length, config, reach, **options)
    return out, blocks


def _compressed_forward(query, keys, values, reach, length, config, kernels):
    forward, options = PASSES[kernels.chip].compressed_forward, dict(interpret=kernels.interpret)
    given = query, keys, values
    out, log_sum, blocks = forward(*given, length, config, reach, **options)
    return (out, blocks), (*given, reach, out, log_sum)


def _compressed_backward(length, config, kernels, saved, grads):
    query, keys, values, reach, out, log_sum = saved
    reads = flash.clipped(compressed_reads(reach, config), keys.shape[1])
    backward = flash.kernels(kernels.name, Expected(diagonal=True))[1]
    return *backward(query, keys, values, reads, out, log_sum, grads[0]), None


compressed.defvjp(_compressed_forward, _compressed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def selected(query, keys, values, blocks, reach, config, kernels):
    """Attended values."""
    forward, options = PASSES[kernels.chip].selected_forward, dict(interpret=kernels.interpret)
    return forward(query, keys, values, blocks, config, reach, **options)[0]


def _selected_forward(query, keys, values, blocks, reach, config, kernels):
    forward, options = PASSES[kernels.chip].selected_forward, dict(interpret=kernels.interpret)
    given = query, keys, values, blocks
    out, log_sum = forward(*given, config, reach, **options)
    return out, (*given, reach, out, log_sum)


def _selected_backward(config, kernels, saved, out_grad):
    *given, reach, out, log_sum = saved
    backward, options = PASSES[kernels.chip].selected_backward, dict(interpret=kernels.interpret)
    found = backward(*given, out, log_sum, out_grad, config, reach, **options)
    return *found, None, None


selected.defvjp(_selected_forward, _selected_backward)
