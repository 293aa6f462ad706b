"""BERT, bare and with each of its heads."""

from typing import Any

from lineage_jax.models.bert import Bert, BertConfig, PairClassifier, PreTraining
from lineage_jax.pretrained import encoder
from lineage_jax.pretrained.architecture import Settings
from lineage_jax.pretrained.encoder import Family, dense, norm
from lineage_jax.pretrained.tensors import Table


def config(theirs: Settings) -> BertConfig:
    """Of `BertModel`."""
    return BertConfig(**encoder.config_settings(theirs))


def table(config: BertConfig) -> Table:
    """`BertModel` without its pooler."""
    return {**encoder.embeddings(config), **blocks("encoder.layer.{}")}


def blocks(layer: str) -> Table:
    """A block of BERT and of RoBERTa."""
    rows: dict[str, Any] = {}
    for ours, theirs in (
        ("attention/query", "attention.self.query"),
        ("attention/key", "attention.self.key"),
        ("attention/value", "attention.self.value"),
        ("attention/out", "attention.output.dense"),
        ("mlp/up", "intermediate.dense"),
        ("mlp/down", "output.dense"),
    ):
        rows |= dense(f"blocks/{ours}", f"{layer}.{theirs}")
    rows |= norm("blocks/attention_norm", f"{layer}.attention.output.LayerNorm")
    rows |= norm("blocks/mlp_norm", f"{layer}.output.LayerNorm")
    return rows


BERT = Family(
    model_type="bert",
    name="Bert",
    config=config,
    settings=encoder.settings,
    encoder=Bert,
    table=table,
    pooler="pooler.dense",
    head=(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        "cls.predictions.bias",
    ),
)
PAIRS = dense("pairs", "cls.seq_relationship")
ARCHITECTURES = (
    BERT.masked_lm("cls.seq_relationship.weight", "cls.seq_relationship.bias"),
    BERT.model(),
    BERT.architecture(
        "ForPreTraining",
        lambda config: PreTraining(Bert(config)),
        lambda config: {**BERT.head_rows(config), **BERT.pooler_rows(), **PAIRS},
        "prediction_logits",
        "seq_relationship_logits",
        ignored=encoder.BUFFERS,
        **BERT.ties,
    ),
    BERT.architecture(
        "ForNextSentencePrediction",
        lambda config: PairClassifier(Bert(config)),
        lambda config: {**BERT.pooler_rows(), **PAIRS},
        "logits",
        ignored=encoder.BUFFERS,
    ),
    BERT.sequence_classifier(),
    BERT.token_classifier(),
    BERT.span_finder(),
)
