"""What is compiled: one milestone's step on one mesh, the same to train it and to plan for it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from lineage_jax import sharding
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import LossFn, make_train_step, many_steps
from lineage_jax.typing import Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """All that decides what the compiler sees: of the data, shapes alone.

    Attributes:
      init: from a key, the boxed parameters and `extra`.
      loss_fn: the objective in training; `eval_loss_fn` the same without dropout.
      tx: the optimiser, whose update takes `learning_rate`.
      batch: the shapes of a global batch's arrays, boxed with the names of their axes
        (`sharding.named`); the first array is one of tokens, [rows, tokens].
      flops_per_token: of the forward and backward pass, for MFU.
      max_grad_norm: see `make_train_step`.
      after: see `make_train_step`.
      in_use: from parameters and `extra`, the parameters that are evaluated and used: where
        training has an average of them, say, that.
    """

    init: Callable[[PRNGKeyArray], tuple[Any, Any]]
    loss_fn: LossFn
    eval_loss_fn: LossFn
    tx: optax.GradientTransformation
    batch: Mapping[str, nn.LogicallyPartitioned]
    flops_per_token: int
    max_grad_norm: float | None = None
    after: Callable[[Params, Any], Any] | None = None
    in_use: Callable[[Params, Any], Params] = lambda params, extra: params

    @property
    def batch_size(self) -> int:
        """Rows of a global batch."""
        return self._tokens.shape[0]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch, padding included."""
        return math.prod(self._tokens.shape)

    @property
    def _tokens(self) -> jax.ShapeDtypeStruct:
        return next(iter(self.batch.values())).value

    def state(self, seed: int) -> TrainState:
        """The state before the first step, boxed."""
        params, extra = self.init(jax.random.key(seed))
        return TrainState.create(params, self.tx, seed=seed, extra=extra)

    def initial_state(self, mesh: Mesh, seed: int) -> TrainState:
        """The state before the first step, each array made where it lives on the mesh."""
        return sharding.init_sharded(lambda: self.state(seed), mesh)

    def abstract_state(self, mesh: Mesh) -> TrainState:
        """The shapes of the state, and where its arrays live on the mesh."""
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            nn.meta.unbox(self._boxed_shapes),
            sharding.shardings(self._boxed_shapes, mesh),
        )

    @functools.cached_property
    def _boxed_shapes(self) -> TrainState:
        return jax.eval_shape(lambda: self.state(0))  # to trace a model takes a while: once

    def abstract_batches(self, mesh: Mesh, num_steps: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the batches of several steps, and where they live on the mesh."""
        feed = sharding.Feed(self.batch, mesh)
        return {
            name: jax.ShapeDtypeStruct(
                (num_steps, *box.value.shape), box.value.dtype, sharding=feed.stacked[name]
            )
            for name, box in self.batch.items()
        }

    def train_steps(self, mesh: Mesh, *, accumulate: int = 1) -> Any:
        """The step that trains, compiled when it is first called (or lowered).

        It takes (state, batches of S steps on end, S learning rates), and gives the state, whose
        argument is donated, and the metrics of each step.

        Raises:
          ValueError: if the batch does not divide in `accumulate` micro-batches.
        """
        if self.batch_size % accumulate:
            raise ValueError(
                f"batch size {self.batch_size} does not divide in accumulate={accumulate} "
                "micro-batches; choose one that divides it"
            )
        step = make_train_step(
            self.loss_fn,
            self.tx,
            accumulate=accumulate,
            max_grad_norm=self.max_grad_norm,
            after=self.after,
        )
        state = jax.tree.map(lambda x: x.sharding, self.abstract_state(mesh))
        whole = sharding.replicated(mesh)
        return jax.jit(
            many_steps(step),
            in_shardings=(state, sharding.Feed(self.batch, mesh).stacked, whole),
            out_shardings=(state, whole),
            donate_argnums=0,
        )

    def eval_step(self, mesh: Mesh) -> Any:
        """The metrics of one batch, with no update: takes (state, batch)."""
        state = jax.tree.map(lambda x: x.sharding, self.abstract_state(mesh))
        return jax.jit(
            make_eval_step(self.eval_loss_fn, self.in_use),
            in_shardings=(state, sharding.Feed(self.batch, mesh).shardings),
            out_shardings=sharding.replicated(mesh),
        )

    def compile_for(self, mesh: Mesh, *, accumulate: int = 1) -> Any:
        """The compiled step of a mesh whose devices need not be here, nor exist."""
        rate = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=sharding.replicated(mesh))
        # Outside the mesh's context, where taking shapes out of their boxes would constrain them.
        steps = self.train_steps(mesh, accumulate=accumulate)
        state, batches = self.abstract_state(mesh), self.abstract_batches(mesh, 1)
        with sharding.use(mesh):
            return steps.lower(state, batches, rate).compile()


def make_eval_step(
    loss_fn: LossFn, in_use: Callable[[Params, Any], Params] = lambda params, extra: params
) -> Callable[[TrainState, Any], Any]:
    """The metrics of one batch, with no update, of the parameters that are `in_use`."""

    def eval_step(state, batch):
        params = in_use(state.params, state.extra)
        return loss_fn(params, state.extra, batch, state.rng())[1][1]

    return eval_step
