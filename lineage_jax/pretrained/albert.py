"""ALBERT: narrow tables, and one layer in place of all."""

from typing import Any

from lineage_jax.models.albert import Albert, AlbertConfig
from lineage_jax.models.bert import PreTraining
from lineage_jax.pretrained import encoder
from lineage_jax.pretrained.architecture import Settings, check
from lineage_jax.pretrained.encoder import Family, dense, norm
from lineage_jax.pretrained.tensors import Table


def config(theirs: Settings) -> AlbertConfig:
    """Of `AlbertModel`."""
    check(theirs, num_hidden_groups=1, inner_group_num=1)
    theirs = {"hidden_act": "gelu_new", "hidden_dropout_prob": 0.0, **theirs}  # ALBERT's defaults
    ours = encoder.config_settings(theirs)
    return AlbertConfig(**ours, table_dim=theirs["embedding_size"])


def settings(config: AlbertConfig) -> dict[str, Any]:
    """ALBERT's."""
    return {
        **encoder.settings(config),
        "embedding_size": config.table_dim,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
    }


def table(config: AlbertConfig) -> Table:
    """`AlbertModel` without its pooler."""
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    rows = dict(encoder.embeddings(config))
    rows |= dense("widen", "encoder.embedding_hidden_mapping_in")
    for ours, theirs in (
        ("attention/query", "attention.query"),
        ("attention/key", "attention.key"),
        ("attention/value", "attention.value"),
        ("attention/out", "attention.dense"),
        ("mlp/up", "ffn"),
        ("mlp/down", "ffn_output"),
    ):
        rows |= dense(f"block/{ours}", f"{layer}.{theirs}")
    rows |= norm("block/attention_norm", f"{layer}.attention.LayerNorm")
    rows |= norm("block/mlp_norm", f"{layer}.full_layer_layer_norm")
    return rows


ALBERT = Family(
    model_type="albert",
    name="Albert",
    config=config,
    settings=settings,
    encoder=Albert,
    table=table,
    pooler="pooler",
    head=(
        "predictions.dense",
        "predictions.LayerNorm",
        "predictions.decoder",
        "predictions.bias",
    ),
)
PAIRS = dense("pairs", "sop_classifier.classifier")
ARCHITECTURES = (
    ALBERT.masked_lm("sop_classifier.classifier.weight", "sop_classifier.classifier.bias"),
    ALBERT.model(),
    ALBERT.architecture(
        "ForPreTraining",
        lambda config: PreTraining(Albert(config)),
        lambda config: {**ALBERT.head_rows(config), **ALBERT.pooler_rows(), **PAIRS},
        "prediction_logits",
        "sop_logits",
        ignored=encoder.BUFFERS,
        **ALBERT.ties,
    ),
    ALBERT.sequence_classifier(),
    ALBERT.token_classifier(),
    ALBERT.span_finder(),
)
