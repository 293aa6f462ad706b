"""RoBERTa: BERT's encoder under BERT's names, positions after padding's, heads of its own."""

from typing import Any

from lineage_jax.models.roberta import Roberta, RobertaConfig
from lineage_jax.pretrained import bert, encoder
from lineage_jax.pretrained.architecture import Settings
from lineage_jax.pretrained.encoder import Family


def config(theirs: Settings) -> RobertaConfig:
    """Of `RobertaModel`.

    Raises:
      ValueError: if padding has no id, or its position leaves no room for tokens.
    """
    padding_id, rows = theirs.get("pad_token_id", 1), theirs["max_position_embeddings"]
    if padding_id is None or not 0 <= padding_id < rows - 1:
        raise ValueError(
            f"wanted pad_token_id in [0, {rows - 1}), below the positions of tokens, "
            f"got {padding_id}"
        )
    ours = encoder.config_settings(theirs)
    return RobertaConfig(**{**ours, "max_len": rows - padding_id - 1}, padding_id=padding_id)


def settings(config: RobertaConfig) -> dict[str, Any]:
    """RoBERTa's."""
    return {**encoder.settings(config), "pad_token_id": config.padding_id}


ROBERTA = Family(
    model_type="roberta",
    name="Roberta",
    config=config,
    settings=settings,
    encoder=Roberta,
    table=bert.table,
    pooler="pooler.dense",
    head=("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
    head_activation="gelu",  # whatever the blocks have
    classifier=("classifier.dense", "classifier.out_proj"),
)
ARCHITECTURES = (
    ROBERTA.masked_lm(),
    ROBERTA.model(),
    ROBERTA.sequence_classifier(),
    ROBERTA.token_classifier(),
    ROBERTA.span_finder(),
)
