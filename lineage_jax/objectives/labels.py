"""The objective of classifiers, alone and beside the language model's, as GPT-1 is fine-tuned."""

import jax.numpy as jnp

from lineage_jax.objectives.language import next_token_loss
from lineage_jax.objectives.masked import Metrics
from lineage_jax.typing import Array, Bool, Float, Int


def label_loss(
    logits: Float[Array, "B N"], label: Int[Array, "B"], kept: Bool[Array, "B"]
) -> tuple[Float[Array, ""], Metrics]:
    """Mean of -log p(label) (L2: Radford et al. 2018, equation 4).

    Args:
      logits: of each label.
      label: the true one, in [0, N).
      kept: False for rows that do not count, such as those that fill up a batch.

    Returns:
      The loss in nats per row, and "loss" and "accuracy" as (sum, count) pairs.
    """
    return next_token_loss(logits[:, None], label[:, None], kept[:, None])  # the same sum


def fine_tuning_loss(
    logits: Float[Array, "B N"],
    label: Int[Array, "B"],
    token_logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    language_weight: float = 0.5,
) -> tuple[Float[Array, ""], Metrics]:
    """L3 = L2 + lambda L1: the labels, and the text itself (Radford et al. 2018, equation 5).

    Both are means, of rows and of tokens: lambda weighs a token's loss against a row's.

    Args:
      logits, label: as for `label_loss`.
      token_logits: of the next token at each position.
      tokens: ids of the row, the marks around its text included.
      mask: False for padding; a row without any token does not count.
      language_weight: lambda; 0.5 in section 4.1. With 0 the tokens are not learnt.

    Returns:
      The loss in nats, and as (sum, count) pairs "loss" and "accuracy" of labels, and
      "language_loss" of tokens.
    """
    value, metrics = label_loss(logits, label, mask.any(-1))
    if not language_weight:
        return value, metrics
    both = mask[:, 1:] & mask[:, :-1]
    language, of_tokens = next_token_loss(token_logits[:, :-1], tokens[:, 1:], both)
    total = value + jnp.float32(language_weight) * language
    return total, {**metrics, "language_loss": of_tokens["loss"]}
