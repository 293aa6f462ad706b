"""Blocks as a pipeline: each stage of devices holds some layers, and micro-batches pass through.

Huang et al. 2019, GPipe, section 2 (arXiv 1811.06965): a batch is cut in M micro-batches, and while
stage s has one, stage s - 1 has the next. Of M + S - 1 turns each stage idles S - 1, which is
little once M >= 4 S (section 2.3). With fewer rows than that, each stage holds several groups of
layers that are not neighbours, and micro-batches go round several times: R rounds cut the idle
turns' share to (S - 1) / (R M + S - 1) (Narayanan et al. 2021, section 2.2, arXiv 2104.04473).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lineage_jax.nn.split import without
from lineage_jax.typing import Array, Float

ENOUGH = 4  # micro-batches and rounds to a stage: GPipe, section 2.3


class Schedule(NamedTuple):
    """S stages, M micro-batches, R rounds."""

    stages: int
    microbatches: int
    rounds: int

    @property
    def turns(self) -> int:
        """Of the whole pipeline, from the first micro-batch in to the last one out."""
        return self.rounds * self.microbatches + self.stages - 1

    @property
    def idle(self) -> float:
        """The part of its turns that each stage has nothing to do."""
        return (self.stages - 1) / self.turns


def schedule(stages: int, num_layers: int, rows: int) -> Schedule:
    """As many micro-batches as are enough, then as few rounds.

    Args:
      stages: devices that a micro-batch passes through; they divide the layers.
      num_layers: of the whole stack.
      rows: of the batch that one replica of the pipeline computes.
    """
    enough = ENOUGH * stages
    microbatches = max(m for m in range(1, min(rows, enough) + 1) if rows % m == 0)
    deep = num_layers // stages
    rounds = [r for r in range(1, deep + 1) if deep % r == 0]
    if microbatches < stages:  # a second round would wait for the first
        return Schedule(stages, microbatches, 1)
    wanted = [r for r in rounds if r * microbatches >= enough]
    return Schedule(stages, microbatches, wanted[0] if wanted else rounds[-1])


def pipeline(
    layer: Callable[[Float[Array, "b T D"], Any, Any], Float[Array, "b T D"]],
    x: Float[Array, "B T D"],
    shared: Any,
    layers: Any,
    key: Array | None,
    plan: Schedule,
    axis: str,
) -> Float[Array, "B T D"]:
    """Applies a stack of layers, split over the mesh axis `axis`, to a batch.

    Args:
      layer: from a micro-batch, its rows of `shared`, one slice of `layers` and a key (or None),
        what the layer makes of it.
      x: the batch.
      shared: a pytree of arrays; those with a leading axis of B are cut as x is.
      layers: a pytree of arrays with a leading axis of layers.
      key: of the layers' random numbers; each layer and micro-batch has its own.
      plan: see `schedule`.
      axis: of the mesh in use.
    """
    stages, count, rounds = plan
    num_rows = x.shape[0]
    depth = jax.tree.leaves(layers)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)

    def cut(x):
        """Rows m, M + m, ... are micro-batch m: each replica's rows are in all of them."""
        if x.shape[0] != num_rows:
            return x[None]
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def by_stage(x):
        """[R S K ...] to [S R K ...]: round r of stage s holds the layers from (r S + s) K."""
        return x.reshape(rounds, stages, -1, *x.shape[1:]).swapaxes(0, 1)

    def stage(layers, keys, queue, shared):
        layers, keys = jax.tree.map(lambda x: x[0], (layers, keys))  # R K ...
        here = jax.lax.axis_index(axis)
        queue = jax.lax.pcast(queue, (axis,), to="varying")
        after = [(s, (s + 1) % stages) for s in range(stages)]

        def arrive(queue, done, turn):
            """What the last stage has finished goes back to the first, for the next round."""
            came = jax.lax.ppermute(done, axis, after)
            task = turn - stages
            place = jnp.maximum(task, 0) % count
            back = jax.lax.dynamic_update_index_in_dim(queue, came, place, 0)
            return came, jnp.where((here == 0) & (task >= 0), back, queue)

        def turn(carry, number):
            came, queue = arrive(*carry, number)
            task = jnp.clip(number - here, 0, rounds * count - 1)
            part, micro = task // count, task % count
            x = jnp.where(here == 0, queue[number % count], came)
            rows = jax.tree.map(lambda x: x[micro if x.shape[0] > 1 else 0], shared)
            group, group_keys = jax.tree.map(lambda x: x[part], (layers, keys))

            def one(x, inputs):
                weights, key = inputs
                key = None if key is None else jax.random.fold_in(key, micro)
                return layer(x, rows, weights, key), None

            x, _ = jax.lax.scan(one, x, (group, group_keys))
            return (queue, x), None

        with without(axis):
            (queue, done), _ = jax.lax.scan(
                turn, (queue, jnp.zeros_like(queue[0])), jnp.arange(plan.turns)
            )
        _, queue = arrive(queue, done, jnp.asarray(plan.turns))
        return jax.lax.psum(jnp.where(here == 0, queue, 0), axis)

    mapped = jax.shard_map(
        stage, in_specs=(P(axis), P(axis), P(), P()), out_specs=P(), axis_names={axis}
    )
    layers, keys = jax.tree.map(by_stage, (layers, keys))
    out = mapped(layers, keys, cut(x), jax.tree.map(cut, shared))  # M b T D
    return out.swapaxes(0, 1).reshape(x.shape)
