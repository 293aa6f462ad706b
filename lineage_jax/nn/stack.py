"""Depth: one block, repeated."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.nn.attention import HEADS
from lineage_jax.nn.fused import ATTENDED
from lineage_jax.nn.linear import INNER, OUTER
from lineage_jax.nn.pipeline import pipeline, schedule
from lineage_jax.nn.split import split, ways
from lineage_jax.typing import Params

Remat = Literal["none", "dots", "inner", "attention", "full"]
"""What the backward pass recomputes of a block: nothing; all but matrix products and attention; of
the products those back to the width of the block, too, which `tensor` does not split; all but
attention, from its heads to what they attended to; or all of it."""

LAYER = "layer_{}"
FIRST = LAYER.format(0)

POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(INNER, OUTER, HEADS, ATTENDED),
    "inner": jax.checkpoint_policies.save_only_these_names(INNER, HEADS, ATTENDED),
    "attention": jax.checkpoint_policies.save_only_these_names(HEADS, ATTENDED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack(
    block: type[nn.Module], num_layers: int, *, remat: Remat = "none", unroll: int = 1
) -> Callable[..., Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]]:
    """A module of `num_layers` blocks in turn, as one `lax.scan`, compiled once for any depth.

    Where the mesh splits the layers, whole sequences pass through them as a pipeline instead
    (`lineage_jax.nn.pipeline`); blocks that return an output, such as a cache, stay a scan. Given
    parameters that were taken `apart`, it is a plain loop.

    Args:
      block: a module whose call takes `(x, shared, per_layer)` and returns `(x, output)`, where
        `shared` is a pytree that every block receives whole and `per_layer` one slice of a pytree
        of arrays with a leading axis of `num_layers`.
      num_layers: the depth.
      remat: what the backward pass recomputes to save memory.
      unroll: how many layers one iteration of the scan holds; `num_layers` makes a plain loop.

    Returns:
      From the fields of `block` and a name, a function of `(x, shared, per_layer)`. The blocks'
      parameters have a leading axis named "layers", and the outputs come stacked.
    """
    if remat != "none":
        # Inside a scan the compiler cannot merge the recomputation with the forward pass.
        block = nn.remat(block, policy=POLICIES[remat], prevent_cse=False)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=num_layers,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )

    def build(*fields: Any, name: str) -> Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]:
        blocks = scanned(*fields, name=name)

        def layer(x, shared, inputs, key):
            params, per_layer = inputs
            rngs = {} if key is None else {"dropout": key}
            return block(*fields).apply({"params": params}, x, shared, per_layer, rngs=rngs)

        def call(x: jax.Array, shared: Any, per_layer: Any) -> tuple[jax.Array, Any]:
            params = {} if blocks.is_initializing() else blocks.variables["params"]
            if FIRST in params:
                outputs = []
                for i in range(num_layers):
                    here = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
                    x, output = layer(x, shared, (params[LAYER.format(i)], here), None)
                    outputs.append(output)
                return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
            stages = split("layers")
            if stages is None or not params:
                return blocks(x, shared, per_layer)
            layers = (params, per_layer)
            first = jax.tree.map(lambda leaf: leaf[0], layers)
            key = blocks.make_rng("dropout") if blocks.has_rng("dropout") else None
            _, output = jax.eval_shape(layer, x, shared, first, key)
            if jax.tree.leaves(output):
                return blocks(x, shared, per_layer)
            axis, count = stages
            plan = schedule(count, num_layers, x.shape[0] // ways("batch", but=axis))
            run = lambda *inputs: layer(*inputs)[0]  # noqa: E731
            return pipeline(run, x, shared, layers, key, plan, axis), output

        return call

    return build


def apart(params: Params, name: str = "blocks") -> Params:
    """Parameters whose stacks of layers, dicts called `name`, are dicts of layers instead.

    A scan copies each layer out of the stack before it is used; where little else is done with it,
    as for one token, that takes as long again.
    """
    found: dict[str, Any] = {}
    for key, value in params.items():
        if key == name:
            depth = len(jax.tree.leaves(value)[0])
            found[key] = {
                LAYER.format(i): jax.tree.map(lambda leaf, i=i: leaf[i], value)
                for i in range(depth)
            }
        else:
            found[key] = apart(value, name) if isinstance(value, Mapping) else value
    return found
