"""DistilBERT: BERT's encoder under names of its own, without types and pooler."""

from typing import Any

import jax
from flax import linen as nn

from lineage_jax.models.distilbert import DistilBert, DistilBertConfig
from lineage_jax.pretrained import encoder
from lineage_jax.pretrained.architecture import Call, Settings
from lineage_jax.pretrained.encoder import Family, caller, dense, norm
from lineage_jax.pretrained.tensors import Table
from lineage_jax.typing import Params

NORM_EPSILON = 1e-12
"""Of all its norms; no setting of theirs."""


def config(theirs: Settings) -> DistilBertConfig:
    """Of `DistilBertModel`."""
    return DistilBertConfig(
        num_layers=theirs["n_layers"],
        embed_dim=theirs["dim"],
        num_heads=theirs["n_heads"],
        mlp_dim=theirs["hidden_dim"],
        max_len=theirs["max_position_embeddings"],
        dropout_rate=theirs.get("dropout", 0.1),
        norm_epsilon=NORM_EPSILON,
        **encoder.shared_settings(theirs, activation="activation"),
    )


def settings(config: DistilBertConfig) -> dict[str, Any]:
    """DistilBERT's.

    Raises:
      ValueError: for what their classes have no setting for.
    """
    c = config
    if c.norm_epsilon != NORM_EPSILON:
        raise ValueError(f"wanted norm_epsilon {NORM_EPSILON}, got {c.norm_epsilon}")
    if c.num_types:
        raise ValueError(f"wanted num_types 0, got {c.num_types}")
    return {
        "n_layers": c.num_layers,
        "dim": c.embed_dim,
        "n_heads": c.num_heads,
        "hidden_dim": c.mlp_dim or 4 * c.embed_dim,
        "max_position_embeddings": c.max_len,
        "activation": encoder.their_activation(c),
        "vocab_size": c.vocab_size,
        "num_labels": c.num_labels,
        "tie_word_embeddings": c.tied_embeddings,
        **dict.fromkeys(("dropout", "attention_dropout"), c.dropout_rate),
    }


def table(config: DistilBertConfig) -> Table:
    """`DistilBertModel`."""
    layer = "transformer.layer.{}"
    rows = dict(encoder.embeddings(config))
    for ours, theirs in (
        ("attention/query", "attention.q_lin"),
        ("attention/key", "attention.k_lin"),
        ("attention/value", "attention.v_lin"),
        ("attention/out", "attention.out_lin"),
        ("mlp/up", "ffn.lin1"),
        ("mlp/down", "ffn.lin2"),
    ):
        rows |= dense(f"blocks/{ours}", f"{layer}.{theirs}")
    rows |= norm("blocks/attention_norm", f"{layer}.sa_layer_norm")
    rows |= norm("blocks/mlp_norm", f"{layer}.output_layer_norm")
    return rows


def caller_without_types(*names: str) -> Call:
    """`caller`, of models that know no types."""
    with_types = caller(*names)

    def call(
        module: nn.Module,
        params: Params,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
    ) -> dict[str, jax.Array]:
        return with_types(module, params, input_ids, attention_mask, None, position_ids)

    return call


DISTILBERT = Family(
    model_type="distilbert",
    name="DistilBert",
    config=config,
    settings=settings,
    encoder=DistilBert,
    table=table,
    head=("vocab_transform", "vocab_layer_norm", "vocab_projector", None),
    classifier=("pre_classifier", "classifier"),
    classifier_activation=nn.relu,
    call=caller_without_types,
)
ARCHITECTURES = (
    DISTILBERT.masked_lm(),
    DISTILBERT.model(),
    DISTILBERT.sequence_classifier(),
    DISTILBERT.token_classifier(),
    DISTILBERT.span_finder(),
)
