"""The objectives of masked language models: what was left out, and whether a pair is one."""

import jax.numpy as jnp

from lineage_jax.objectives.language import next_token_loss
from lineage_jax.typing import Array, Bool, Float, Int

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def masked_token_loss(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Metrics]:
    """Mean of -log p(target) over the positions that were chosen (Devlin et al. 2018, section 3.1).

    Args:
      logits: of the token at each position itself.
      targets: ids of the tokens as they were, in [0, V).
      mask: True where the token was chosen.

    Returns:
      The loss in nats per chosen token, and "loss" and "accuracy" as (sum, count) pairs.
    """
    return next_token_loss(logits, targets, mask)  # the same sum; only the targets differ


def pretraining_loss(
    logits: Float[Array, "B T V"],
    pair_logits: Float[Array, "B 2"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    label: Int[Array, "B"],
    pair_mask: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The mean over chosen tokens and the mean over pairs, added (Devlin et al. 2018, A.2).

    Args:
      logits, targets, mask: as for `masked_token_loss`.
      pair_logits: of each label.
      label: 0 where the second part follows the first, in [0, 2); of ALBERT, where it is in order.
      pair_mask: False for rows that are no pair, such as those that fill up a batch.

    Returns:
      The loss in nats, and as (sum, count) pairs "loss" and "accuracy" of tokens, "pair_loss" and
      "pair_accuracy" of pairs.
    """
    pair_mask = jnp.ones_like(label, bool) if pair_mask is None else pair_mask
    tokens, metrics = masked_token_loss(logits, targets, mask)
    pairs, of_pairs = next_token_loss(pair_logits[:, None], label[:, None], pair_mask[:, None])
    return tokens + pairs, {**metrics, **{f"pair_{name}": of_pairs[name] for name in of_pairs}}
