"""One training step, built once for every milestone.

The step is a pure function of (state, batch, learning rate). The learning rate is an argument, a
traced value that the host computes from the schedule: runs that differ in their learning rate,
schedule or length share one compiled program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lineage_jax.train.state import TrainState
from lineage_jax.typing import Array, Batch, Float, Params, PRNGKeyArray

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
"""Name -> (sum, count): sums and counts add up over micro-batches, steps and hosts."""

LossFn = Callable[[Params, Any, Batch, PRNGKeyArray], tuple[Float[Array, ""], tuple[Any, Metrics]]]
"""(params, extra, batch, rng) -> (loss, (extra, metrics)); metrics["loss"] holds its count."""

TrainStep = Callable[[TrainState, Batch, Float[Array, ""]], tuple[TrainState, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    after: Callable[[Params, Any], Any] | None = None,
) -> TrainStep:
    """Builds the step: gradients, clipping, a guard against what is not finite, and the update.

    Args:
      loss_fn: the loss on one (micro-)batch; its loss is a mean over metrics["loss"]'s count.
      tx: the optimiser; its update receives `learning_rate` as an extra argument.
      accumulate: in how many micro-batches, one after the other, a batch is computed. Each counts
        by its number of kept tokens, so the gradient is that of the whole batch.
      max_grad_norm: gradients are scaled down to this global norm (Pascanu et al. 2013).
      after: computes `extra` from the new parameters, for what must follow the update.

    Returns:
      The step. A step whose loss or gradient is not finite changes nothing but `step` and
      `skipped`, and adds nothing to its metrics but "skipped".
    """
    tx = optax.with_extra_args_support(tx)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(state, batch):
        if accumulate == 1:
            (_, (extra, metrics)), grads = grad_fn(state.params, state.extra, batch, state.rng())
            return grads, extra, metrics
        return accumulated(grad_fn, state, batch, accumulate)

    def train_step(state, batch, learning_rate):
        grads, extra, metrics = gradients(state, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"][0])
        if max_grad_norm is not None:
            scale = jnp.minimum(1.0, max_grad_norm / (grad_norm + 1e-6))  # as torch does
            grads = jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, learning_rate=learning_rate
        )
        params = optax.apply_updates(state.params, updates)
        if after is not None:
            extra = after(params, extra)
        new, old = (params, extra, opt_state), (state.params, state.extra, state.opt_state)
        params, extra, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), new, old
        )
        metrics["grad_norm"] = (grad_norm, jnp.ones(()))
        metrics = jax.tree.map(lambda value: jnp.where(finite, value, 0.0), metrics)
        metrics["skipped"] = (1.0 - finite, jnp.ones(()))
        state = state.replace(
            step=state.step + 1,
            params=params,
            extra=extra,
            opt_state=opt_state,
            skipped=jnp.where(finite, 0, state.skipped + 1),
        )
        return state, metrics

    return train_step


def accumulated(
    grad_fn: Callable, state: TrainState, batch: Batch, accumulate: int
) -> tuple[Params, Any, Metrics]:
    """The gradient of a batch, computed in `accumulate` micro-batches, each by its own count."""
    micro = jax.tree.map(
        lambda rows: rows.reshape(accumulate, rows.shape[0] // accumulate, *rows.shape[1:]), batch
    )

    def body(carry, inputs):
        grads, extra = carry
        batch, rng = inputs
        (_, (extra, metrics)), new = grad_fn(state.params, extra, batch, rng)
        count = metrics["loss"][1]
        grads = jax.tree.map(lambda total, grad: total + count * grad, grads, new)
        return (grads, extra), metrics

    # Sums belong in float32, whatever the parameters are.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
    rngs = jax.random.split(state.rng(), accumulate)
    (grads, extra), metrics = jax.lax.scan(body, (zeros, state.extra), (micro, rngs))
    metrics = jax.tree.map(lambda value: value.sum(0), metrics)
    count = jnp.maximum(metrics["loss"][1], 1.0)
    grads = jax.tree.map(lambda g, p: (g / count).astype(p.dtype), grads, state.params)
    return grads, extra, metrics


def many_steps(train_step: TrainStep) -> TrainStep:
    """The same step, repeated inside one compiled program: `lax.scan` over a stack of batches.

    Batches and learning rates have a leading axis of steps, and so have the metrics that return.
    """

    def body(state, inputs):
        return train_step(state, *inputs)

    def steps(state, batches, learning_rates):
        return jax.lax.scan(body, state, (batches, learning_rates))

    return steps
