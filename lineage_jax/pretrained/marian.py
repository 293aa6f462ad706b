"""Marian's translators: the Transformer of 2017, with a bias of the scores."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.models.transformer import StackConfig, Transformer, TransformerConfig
from lineage_jax.pretrained.architecture import (
    TOKENS,
    Architecture,
    Settings,
    check,
    check_reads,
    without_head,
)
from lineage_jax.pretrained.tensors import Table, Tensor
from lineage_jax.typing import Params

ACTIVATIONS: Mapping[str, Literal["relu", "silu", "gelu"]] = {
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Theirs -> ours."""


def config(theirs: Settings) -> TransformerConfig:
    """Of `MarianMTModel`."""
    activation = theirs.get("activation_function", "gelu")
    check(theirs, activation_function=tuple(ACTIVATIONS))
    encoder, decoder = (
        StackConfig(
            num_layers=theirs[f"{side}_layers"],
            num_heads=theirs[f"{side}_attention_heads"],
            mlp_dim=theirs[f"{side}_ffn_dim"],
        )
        for side in ("encoder", "decoder")
    )
    return TransformerConfig(
        encoder=encoder,
        decoder=decoder,
        embed_dim=theirs["d_model"],
        source_vocab_size=theirs["vocab_size"],
        vocab_size=theirs.get("decoder_vocab_size") or theirs["vocab_size"],
        max_len=theirs["max_position_embeddings"],
        shared_embeddings=theirs.get("share_encoder_decoder_embeddings", True),
        tied_embeddings=theirs.get("tie_word_embeddings", True),
        scaled_embeddings=theirs.get("scale_embedding", False),
        activation=ACTIVATIONS[activation],
        score_bias=True,
        dropout_rate=theirs.get("dropout", 0.1),
        norm_epsilon=1e-5,  # torch.nn.LayerNorm's
    )


def settings(config: TransformerConfig) -> dict[str, Any]:
    """Marian's.

    Raises:
      ValueError: for another epsilon than theirs, which has no setting, or another attention.
    """
    c = config
    check_reads(c)
    if c.norm_epsilon != 1e-5:
        raise ValueError(
            f"Marian's norms have an epsilon of 1e-5, got {c.norm_epsilon}; what is trained with "
            "--model.norm-epsilon 1e-5 can be converted"
        )
    sides = {
        f"{side}_{name}": value
        for side, sizes in (("encoder", c.encoder), ("decoder", c.decoder))
        for name, value in (
            ("layers", sizes.num_layers),
            ("attention_heads", sizes.num_heads),
            ("ffn_dim", sizes.mlp_dim),
        )
    }
    return {
        **sides,
        "d_model": c.embed_dim,
        "vocab_size": c.source_vocab_size,
        "decoder_vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_len,
        "share_encoder_decoder_embeddings": c.shared_embeddings,
        "tie_word_embeddings": c.tied_embeddings,
        "scale_embedding": c.scaled_embeddings,
        "activation_function": "swish" if c.activation == "silu" else c.activation,
        "dropout": c.dropout_rate,
        "is_encoder_decoder": True,
    }


def table(config: TransformerConfig) -> Table:
    """`MarianMTModel`."""
    rows = {"embed/table": Tensor("model.shared.weight")}
    if not config.shared_embeddings:
        rows["embed/table"] = Tensor("model.decoder.embed_tokens.weight")
        rows["source_embed/table"] = Tensor("model.encoder.embed_tokens.weight")
    if not config.tied_embeddings:
        rows["head/table"] = Tensor("lm_head.weight")
    if config.score_bias:
        rows["score_bias"] = Tensor("final_logits_bias", row=True)
    return {**rows, **block("encoder"), **block("decoder")}


def block(side: str) -> Table:
    """A block of that side."""
    attentions = {"attention": "self_attn"}
    if side == "decoder":
        attentions["cross_attention"] = "encoder_attn"
    linears, norms = {"mlp/up": "fc1", "mlp/down": "fc2"}, {"mlp_norm": "final_layer_norm"}
    for ours, theirs in attentions.items():
        norms[f"{ours}_norm"] = f"{theirs}_layer_norm"
        for name in ("query", "key", "value", "out"):
            short = "out" if name == "out" else name[0]
            linears[f"{ours}/{name}"] = f"{theirs}.{short}_proj"
    return {
        f"{side}/blocks/{ours}/{kind}": Tensor(
            f"model.{side}.layers.{{}}.{theirs}.{'bias' if kind == 'bias' else 'weight'}",
            transposed=kind == "kernel",
        )
        for pairs, kinds in ((linears, ("kernel", "bias")), (norms, ("scale", "bias")))
        for ours, theirs in pairs.items()
        for kind in kinds
    }


def tied(config: TransformerConfig) -> dict[str, str]:
    """The tables that are one."""
    if not config.shared_embeddings:
        table = "model.decoder.embed_tokens.weight"
        return {"lm_head.weight": table} if config.tied_embeddings else {}
    again = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
    if config.tied_embeddings:
        again.append("lm_head.weight")
    return dict.fromkeys(again, "model.shared.weight")


def call(
    module: nn.Module,
    params: Params,
    input_ids: Any,
    decoder_input_ids: Any,
    attention_mask: Any = None,
    decoder_attention_mask: Any = None,
) -> dict[str, jax.Array]:
    """Scores of the next token of the target, and what encoder and decoder return.

    Args:
      module: with the Transformer's call.
      params: its parameters.
      input_ids: the source, [B, S].
      decoder_input_ids: the target, after the token that starts it, [B, T].
      attention_mask: 0 for padding of the source, [B, S].
      decoder_attention_mask: 0 for padding of the target, [B, T].
    """
    masks = (
        None if mask is None else mask.astype(bool)
        for mask in (attention_mask, decoder_attention_mask)
    )
    logits, found = module.apply(
        {"params": params}, input_ids, decoder_input_ids, *masks, mutable=["intermediates"]
    )
    hidden = (found["intermediates"][name][0].astype(jnp.float32) for name in ("hidden", "encoded"))
    names = "last_hidden_state", "encoder_last_hidden_state"
    return {"logits": logits, **dict(zip(names, hidden, strict=True))}


def limits(config: TransformerConfig) -> dict[str, int]:
    """Rows of the tables of tokens."""
    return {"input_ids": config.source_vocab_size, "decoder_input_ids": config.vocab_size}


MARIAN = Architecture(
    model_type="marian",
    name="MarianMTModel",
    config=config,
    settings=settings,
    table=table,
    module=Transformer,
    call=call,
    limits=limits,
    prefix="model.",
    ignored=("embed_positions.weight",),
    tied=tied,
    example=(TOKENS, TOKENS),
)
ARCHITECTURES = (MARIAN, without_head(MARIAN, "MarianModel", score_bias=False))
