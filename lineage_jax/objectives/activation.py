"""Penalties on what the last layer of a recurrence puts out: AR and TAR.

Merity et al. 2017, "Revisiting Activation Regularization for Language RNNs", sections 2.1 and 2.2,
arXiv 1708.01009; in AWD-LSTM, section 4.6 of arXiv 1708.02182.
"""

import jax.numpy as jnp

from lineage_jax.typing import Array, Bool, Float, Int


def activation_penalty(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """AR: the mean of squared outputs, after dropout.

    The paper prints the L2 norm; the squares, and their mean over units and tokens, are the
    released code's, and its weights (2, 1) belong to them.

    Args:
      hidden: outputs of the last layer, dropped.
      mask: True where a token counts in the loss.
    """
    return mean_over_tokens(jnp.square(hidden.astype(jnp.float32)).mean(-1), mask)


def slowness_penalty(
    raw: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """TAR: the mean of squared differences between outputs of successive tokens, before dropout.

    The first token of a document differs from nothing, and adds zero. All tokens that count divide
    the sum, so that the penalty of a batch is the mean of its parts; the released code divides by
    the number of pairs, one less in each row.

    Args:
      raw: outputs of the last layer.
      segment_ids: which document of its row a token belongs to.
      mask: True where a token counts in the loss.
    """
    change = jnp.square(jnp.diff(raw.astype(jnp.float32), axis=1)).mean(-1)
    change = jnp.where(segment_ids[:, 1:] == segment_ids[:, :-1], change, 0.0)
    return mean_over_tokens(jnp.pad(change, ((0, 0), (1, 0))), mask)


def mean_over_tokens(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Over the tokens that the mask keeps."""
    kept = mask.astype(jnp.float32)
    return (x * kept).sum() / jnp.maximum(kept.sum(), 1.0)
