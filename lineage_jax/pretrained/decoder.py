"""What the architectures of decoders share: how they are called."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.typing import Params


def call(
    module: nn.Module,
    params: Params,
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
) -> dict[str, jax.Array]:
    """Scores of the next token and what they are made of.

    Args:
      module: with GPT's call.
      params: its parameters.
      input_ids: [B, T].
      attention_mask: 0 for padding, [B, T].
      position_ids: [B, T]; 0 ... T - 1 if not given, as theirs has it, padding or not.
    """
    mask = None if attention_mask is None else attention_mask.astype(bool)
    (logits, _), found = module.apply(
        {"params": params}, input_ids, position_ids, mask=mask, mutable=["intermediates"]
    )
    hidden = found["intermediates"]["hidden"][0].astype(jnp.float32)
    return {"logits": logits, "last_hidden_state": hidden}
