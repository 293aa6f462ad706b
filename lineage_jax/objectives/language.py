"""The objective of language models: the cross-entropy of the next token."""

import jax
import jax.numpy as jnp

from lineage_jax.typing import Array, Bool, Float, Int


def token_losses(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """-log p(target) of each token in nats, from logits by a float32 log-sum-exp.

    Targets must be in [0, V): no value means "ignore", a mask does.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def next_token_loss(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, tuple[Float[Array, ""], Float[Array, ""]]]]:
    """Mean cross-entropy over the tokens that the mask keeps.

    Args:
      logits: of the next token at each position.
      targets: ids of the next tokens, in [0, V).
      mask: True where the target counts.

    Returns:
      The loss in nats per token, and the metrics "loss" and "accuracy" as (sum, count) pairs.
    """
    kept = mask.astype(jnp.float32)
    count = kept.sum()
    total = (token_losses(logits, targets) * kept).sum()
    correct = ((logits.argmax(-1) == targets) * kept).sum()
    loss = total / jnp.maximum(count, 1.0)
    return loss, {"loss": (total, count), "accuracy": (correct, count)}
