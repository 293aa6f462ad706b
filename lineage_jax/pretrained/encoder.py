"""What the architectures of encoders share: heads, how they are called, and most settings."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.models.bert import (
    Activation,
    Bert,
    BertConfig,
    MaskedLM,
    Pooled,
    SequenceClassifier,
    SpanFinder,
    TokenClassifier,
)
from lineage_jax.pretrained.architecture import Architecture, Call, Settings, check
from lineage_jax.pretrained.tensors import Table, Tensor
from lineage_jax.typing import Params

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""What they call each of ours."""

ENCODER = "encoder/"
"""Where our models with heads keep the encoder's parameters."""

POOLER = ("pooler.dense.weight", "pooler.dense.bias", "pooler.weight", "pooler.bias")
BUFFERS = (".position_ids", ".token_type_ids")


def config_settings(theirs: Settings) -> dict[str, Any]:
    """Ours, of those that BERT, RoBERTa and ALBERT spell alike."""
    check(theirs, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    return {
        "num_layers": theirs["num_hidden_layers"],
        "embed_dim": theirs["hidden_size"],
        "num_heads": theirs["num_attention_heads"],
        "mlp_dim": theirs["intermediate_size"],
        "max_len": theirs["max_position_embeddings"],
        "num_types": theirs.get("type_vocab_size", 2),
        "norm_epsilon": theirs.get("layer_norm_eps", 1e-12),
        "dropout_rate": theirs.get("hidden_dropout_prob", 0.1),
        **shared_settings(theirs),
    }


def shared_settings(theirs: Settings, activation: str = "hidden_act") -> dict[str, Any]:
    """Ours, of those that DistilBERT spells as the others do, too.

    Args:
      theirs: the config.
      activation: their name of that setting.
    """
    check(theirs, **{activation: tuple(ACTIVATIONS)})
    return {
        "vocab_size": theirs["vocab_size"],
        "num_labels": theirs.get("num_labels") or len(theirs.get("id2label") or "01"),
        "activation": ACTIVATIONS[theirs.get(activation, "gelu")],
        "tied_embeddings": theirs.get("tie_word_embeddings", True),
    }


def settings(config: BertConfig) -> dict[str, Any]:
    """Those of BERT, RoBERTa and ALBERT.

    Raises:
      ValueError: for a model without types.
    """
    c = config
    if not c.num_types:
        raise ValueError("wanted num_types of 1 or more, got 0")
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.mlp_dim or 4 * c.embed_dim,
        "max_position_embeddings": c.num_positions,
        "type_vocab_size": c.num_types,
        "layer_norm_eps": c.norm_epsilon,
        "hidden_act": their_activation(c),
        "vocab_size": c.vocab_size,
        "num_labels": c.num_labels,
        "tie_word_embeddings": c.tied_embeddings,
        **dict.fromkeys(dropouts, c.dropout_rate),
    }


def their_activation(config: BertConfig) -> str:
    """The name that `transformers` prefers of those for an activation of ours."""
    return "gelu_new" if config.activation == "gelu_tanh" else config.activation


def caller(*names: str) -> Call:
    """The call of a model whose outputs have these names; each gives "last_hidden_state", too."""

    def call(
        module: nn.Module,
        params: Params,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> dict[str, jax.Array]:
        """What the heads make.

        Args:
          module: with the call of `Bert`.
          params: its parameters.
          input_ids: [B, T].
          attention_mask: 0 for padding, [B, T].
          token_type_ids: which sentence each token is of, [B, T]; the first if not given.
          position_ids: rows of the table of positions, [B, T].
        """
        mask = None if attention_mask is None else attention_mask.astype(bool)
        inputs = (input_ids, token_type_ids, position_ids)
        outputs, found = module.apply(
            {"params": params}, *inputs, mask=mask, mutable=["intermediates"]
        )
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sown = found["intermediates"]
        hidden = sown.get("encoder", sown)["hidden"][0].astype(jnp.float32)
        return {"last_hidden_state": hidden, **dict(zip(names, outputs, strict=True))}

    return call


def dense(ours: str, theirs: str) -> Table:
    """A linear map."""
    return {
        f"{ours}/kernel": Tensor(f"{theirs}.weight", transposed=True),
        f"{ours}/bias": Tensor(f"{theirs}.bias"),
    }


def norm(ours: str, theirs: str) -> Table:
    """A norm with scale and bias."""
    return {f"{ours}/scale": Tensor(f"{theirs}.weight"), f"{ours}/bias": Tensor(f"{theirs}.bias")}


def embeddings(config: BertConfig) -> Table:
    """Tables and norm before the blocks, named alike by all."""
    tables = [("tokens", "word"), ("positions", "position"), ("types", "token_type")]
    return {
        **{
            f"embeddings/{ours}/table": Tensor(f"embeddings.{theirs}_embeddings.weight")
            for ours, theirs in (tables if config.num_types else tables[:2])
        },
        **norm("embeddings/norm", "embeddings.LayerNorm"),
    }


def under(table: Table, ours: str, theirs: str) -> Table:
    """The table with something before the names on both sides."""
    return {
        ours + path: dataclasses.replace(row, name=theirs + row.name) for path, row in table.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """An encoder of theirs, and what the architectures with heads on it have in common.

    Attributes:
      model_type: as their config.json calls it.
      name: before "Model", "ForMaskedLM" and so on in the names of their classes.
      config: ours from theirs; raises ValueError for settings that we do not have.
      settings: theirs from ours.
      encoder: builds our encoder of a config.
      table: of the encoder.
      pooler: of the pooler, where there is one: theirs, without the prefix.
      head: theirs of the masked language model: its layer, norm, last map, and a bias that they
        hold beside that map's, if they do.
      head_activation: of that head, if it is not the blocks'.
      classifier: theirs of the layer and the map that score a sequence; the layer is the pooler
        where none is named.
      classifier_activation: between the two.
      call: `caller`, or one that takes fewer inputs.
    """

    model_type: str
    name: str
    config: Callable[[Settings], Any]
    settings: Callable[[Any], dict[str, Any]]
    encoder: Callable[[Any], Bert]
    table: Callable[[Any], Table]
    pooler: str | None = None
    head: tuple[str, str, str, str | None]
    head_activation: Activation | None = None
    classifier: tuple[str | None, str] = (None, "classifier")
    classifier_activation: Callable[[jax.Array], jax.Array] = jnp.tanh
    call: Callable[..., Call] = caller

    def architecture(
        self,
        suffix: str,
        module: Callable[[Any], nn.Module],
        rows: Callable[[Any], Table],
        *outputs: str,
        **others: Any,
    ) -> Architecture:
        """One of their classes.

        Args:
          suffix: of its name.
          module: builds our model of a config.
          rows: of the table, beyond the encoder's.
          *outputs: names of what the model returns.
          **others: fields that are not as below.
        """
        prefix = f"{self.model_type}."
        fields: dict[str, Any] = dict(
            model_type=self.model_type,
            name=self.name + suffix,
            config=self.config,
            settings=self.settings,
            table=lambda config: {**under(self.table(config), ENCODER, prefix), **rows(config)},
            module=module,
            call=self.call(*outputs),
            limits=limits,
            prefix=prefix,
            ignored=BUFFERS + POOLER,
            renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
        )
        return Architecture(**{**fields, **others})

    def model(self) -> Architecture:
        """Their class without a head."""
        bare = self.architecture(
            "Model",
            self.encoder,
            lambda config: {},
            "last_hidden_state",
            table=self.table,
            prefix="",
        )
        if self.pooler is None:
            return bare
        pooler = dense("pooler/dense", self.pooler)
        return dataclasses.replace(
            bare,
            module=lambda config: Pooled(self.encoder(config)),
            table=lambda config: {**under(self.table(config), ENCODER, ""), **pooler},
            call=self.call("last_hidden_state", "pooler_output"),
            ignored=BUFFERS,
            poolerless=bare,
        )

    def masked_lm(self, *ignored: str) -> Architecture:
        """Their class for masked tokens.

        Args:
          *ignored: how names end of what a folder may hold for other heads.
        """
        return self.architecture(
            "ForMaskedLM",
            lambda config: MaskedLM(self.encoder(config), self.head_activation),
            self.head_rows,
            "logits",
            ignored=BUFFERS + POOLER + ignored,
            **self.ties,
        )

    @property
    def ties(self) -> dict[str, Any]:
        """What the head for masked tokens shares, and under which names."""
        _, _, last, bias = self.head
        same = {f"{last}.weight": f"{self.model_type}.embeddings.word_embeddings.weight"}
        if bias is not None:
            same[f"{last}.bias"] = bias
        return {
            "tied": lambda config: same if config.tied_embeddings else {},
            "tied_bias": None if bias is None else (f"{last}.bias", bias),
        }

    def head_rows(self, config: BertConfig) -> Table:
        """Of the head for masked tokens."""
        layer, normed, last, bias = self.head
        rows = {**dense("masked_lm/dense", layer), **norm("masked_lm/norm", normed)}
        used = bias if bias is not None and config.tied_embeddings else f"{last}.bias"
        rows["masked_lm/bias"] = Tensor(used)
        if not config.tied_embeddings:
            rows["masked_lm/table/table"] = Tensor(f"{last}.weight")
        return rows

    def pooler_rows(self) -> Table:
        """Of the pooler under a head."""
        return dense("pooler/dense", f"{self.model_type}.{self.pooler}")

    def sequence_classifier(self) -> Architecture:
        """Their class for labels of a whole sequence."""
        layer, last = self.classifier
        pooler = self.pooler_rows() if layer is None else dense("pooler/dense", layer)
        return self.architecture(
            "ForSequenceClassification",
            lambda config: SequenceClassifier(self.encoder(config), self.classifier_activation),
            lambda config: {**pooler, **dense("classifier", last)},
            "logits",
            ignored=BUFFERS if layer is None else BUFFERS + POOLER,
        )

    def token_classifier(self) -> Architecture:
        """Their class for labels of each token."""
        return self.architecture(
            "ForTokenClassification",
            lambda config: TokenClassifier(self.encoder(config)),
            lambda config: dense("classifier", "classifier"),
            "logits",
        )

    def span_finder(self) -> Architecture:
        """Their class for where an answer starts and ends."""

        def config(theirs: Settings) -> BertConfig:
            ours = self.config(theirs)
            if ours.num_labels != 2:
                raise ValueError(f"wanted num_labels 2, start and end, got {ours.num_labels}")
            return ours

        return self.architecture(
            "ForQuestionAnswering",
            lambda config: SpanFinder(self.encoder(config)),
            lambda config: dense("ends", "qa_outputs"),
            "start_logits",
            "end_logits",
            config=config,
        )


def limits(config: BertConfig) -> dict[str, int]:
    """Rows of the tables of tokens, types and positions."""
    return {
        "input_ids": config.vocab_size,
        "token_type_ids": config.num_types,
        "position_ids": config.num_positions,
    }
