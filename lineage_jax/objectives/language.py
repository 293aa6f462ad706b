"""The objective of language models: the cross-entropy of the next token."""

import jax
import jax.numpy as jnp

from lineage_jax.typing import Array, Bool, Float, Int


def target_logits(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The logit of each target; targets must be in [0, V)."""
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def next_token_loss(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    smoothing: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, tuple[Float[Array, ""], Float[Array, ""]]]]:
    """Mean of -log p(target) over the tokens that the mask keeps, by a float32 log-sum-exp.

    Args:
      logits: of the next token at each position.
      targets: ids of the next tokens, in [0, V). No value means "ignore": the mask does.
      mask: True where the target counts.
      smoothing: the share of each target that all tokens have in equal parts (Szegedy et al. 2016,
        section 7, arXiv 1512.00567). It is in the loss, and not in the metrics.

    Returns:
      The loss in nats per token, and the metrics "loss" and "accuracy" as (sum, count) pairs. A
      token is right if no other has a higher logit.
    """
    logits, kept = logits.astype(jnp.float32), mask.astype(jnp.float32)
    chosen = target_logits(logits, targets)
    count, log_sum = kept.sum(), jax.nn.logsumexp(logits, axis=-1)
    total = ((log_sum - chosen) * kept).sum()
    correct = ((chosen >= logits.max(-1)) * kept).sum()
    loss = total / jnp.maximum(count, 1.0)
    if smoothing:
        even = ((log_sum - logits.mean(-1)) * kept).sum() / jnp.maximum(count, 1.0)
        loss = (1 - smoothing) * loss + smoothing * even
    return loss, {"loss": (total, count), "accuracy": (correct, count)}
