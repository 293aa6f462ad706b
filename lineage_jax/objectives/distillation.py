"""The objective of a student: its teacher's probabilities, the truth, and the teacher's states."""

import jax
import jax.numpy as jnp

from lineage_jax.objectives.masked import Metrics, masked_token_loss
from lineage_jax.typing import Array, Bool, Float, Int


def distillation_loss(
    logits: Float[Array, "B T V"],
    teacher_logits: Float[Array, "B T V"],
    mask: Bool[Array, "B T"],
    temperature: float = 2.0,
) -> Float[Array, ""]:
    """KL(teacher || student) of softmax(logits / temperature), temperature^2 times, per token.

    The square keeps gradients as large at any temperature (Hinton et al. 2015, section 2, arXiv
    1503.02531); 2 is that of the released DistilBERT's training.

    Args:
      logits, teacher_logits: of the student and the teacher; no gradient reaches the teacher's.
      mask: True where a position counts.
      temperature: divides the logits.
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    theirs = jax.nn.log_softmax(teacher_logits / temperature)
    ours = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    divergence = (jnp.exp(theirs) * (theirs - ours)).sum(-1)  # B T
    return temperature**2 * mean(divergence, mask)


def cosine_loss(
    hidden: Float[Array, "B T D"], teacher_hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """1 - cosine of the angle between hidden states, per token (Sanh et al. 2019, section 2)."""
    ours = hidden.astype(jnp.float32)
    theirs = jax.lax.stop_gradient(teacher_hidden.astype(jnp.float32))
    norms = jnp.linalg.norm(ours, axis=-1) * jnp.linalg.norm(theirs, axis=-1)
    return mean(1 - (ours * theirs).sum(-1) / jnp.maximum(norms, 1e-8), mask)


def student_loss(
    logits: Float[Array, "B T V"],
    hidden: Float[Array, "B T D"],
    teacher_logits: Float[Array, "B T V"],
    teacher_hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    target_mask: Bool[Array, "B T"],
    mask: Bool[Array, "B T"],
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0),
    temperature: float = 2.0,
) -> tuple[Float[Array, ""], Metrics]:
    """DistilBERT's three losses, weighted (Sanh et al. 2019, section 2).

    Args:
      logits, hidden: of the student.
      teacher_logits, teacher_hidden: of the teacher, on the same tokens.
      targets: ids of the tokens as they were.
      target_mask: True where the token was chosen: there the student predicts it.
      mask: False for padding: elsewhere the student imitates its teacher.
      weights: of distillation, masked tokens and cosine; those of the released training.
      temperature: as for `distillation_loss`.

    Returns:
      The loss, and the metrics of `masked_token_loss`.
    """
    tokens, metrics = masked_token_loss(logits, targets, target_mask)
    parts = (
        distillation_loss(logits, teacher_logits, mask, temperature),
        tokens,
        cosine_loss(hidden, teacher_hidden, mask),
    )
    return sum((w * part for w, part in zip(weights, parts, strict=True)), jnp.zeros(())), metrics


def mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Over the positions that the mask keeps."""
    kept = mask.astype(jnp.float32)
    return (x * kept).sum() / jnp.maximum(kept.sum(), 1.0)
