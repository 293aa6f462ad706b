"""T5, version 1.1 of it, and mT5: text in, text out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.models.t5 import T5, FeedForwardKind, T5Config
from lineage_jax.pretrained import marian
from lineage_jax.pretrained.architecture import (
    TOKENS,
    Architecture,
    Settings,
    check,
    without_head,
)
from lineage_jax.pretrained.tensors import Table, Tensor
from lineage_jax.typing import Array, Bool, Float, Int, Params

FEED_FORWARDS: Mapping[str, FeedForwardKind] = {
    "relu": "relu",
    "gated-gelu": "geglu",
    "gated-silu": "swiglu",
}
"""Theirs -> ours."""
SUBLAYERS = {
    "attention": "SelfAttention",
    "cross_attention": "EncDecAttention",
    "mlp": "DenseReluDense",
}
"""Ours -> theirs, in their order in a block of the decoder; the encoder's have no second."""


def config(theirs: Settings) -> T5Config:
    """Of `T5ForConditionalGeneration`.

    Their `tie_word_embeddings` says two things: whether one table is the scores' too, and whether
    states are divided by sqrt(d_model) before they are scored. Folders that transformers 5 wrote
    say the second apart, as `scale_decoder_outputs`, and the first not at all: always true, it
    gives way to a head of its own in the tensors. Released models have both or neither.
    """
    scaled = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False)
    return _config(theirs, "relu", tied_embeddings=scaled)


def mt5_config(theirs: Settings) -> T5Config:
    """Of `MT5ForConditionalGeneration`: as version 1.1, whatever it says of tied tables."""
    return _config(theirs, "gated-gelu", tied_embeddings=False)


def _config(theirs: Settings, feed_forward: str, *, tied_embeddings: bool) -> T5Config:
    kinds = (feed_forward, *(kind for kind in FEED_FORWARDS if kind != feed_forward))
    check(theirs, feed_forward_proj=kinds, is_decoder=False)
    num_layers = theirs["num_layers"]
    return T5Config(
        num_encoder_layers=num_layers,
        num_decoder_layers=theirs.get("num_decoder_layers") or num_layers,
        embed_dim=theirs["d_model"],
        num_heads=theirs["num_heads"],
        head_dim=theirs["d_kv"],
        mlp_dim=theirs["d_ff"],
        vocab_size=theirs["vocab_size"],
        num_buckets=theirs.get("relative_attention_num_buckets", 32),
        max_distance=theirs.get("relative_attention_max_distance", 128),
        feed_forward=FEED_FORWARDS[theirs.get("feed_forward_proj", feed_forward)],
        tied_embeddings=tied_embeddings,
        dropout_rate=theirs.get("dropout_rate", 0.1),
        norm_epsilon=theirs.get("layer_norm_epsilon", 1e-6),
    )


def settings(config: T5Config) -> dict[str, Any]:
    """T5's and mT5's."""
    c = config
    (feed_forward,) = (theirs for theirs, ours in FEED_FORWARDS.items() if ours == c.feed_forward)
    return {
        "num_layers": c.num_encoder_layers,
        "num_decoder_layers": c.num_decoder_layers,
        "d_model": c.embed_dim,
        "num_heads": c.num_heads,
        "d_kv": c.head_dim,
        "d_ff": c.mlp_dim,
        "vocab_size": c.vocab_size,
        "relative_attention_num_buckets": c.num_buckets,
        "relative_attention_max_distance": c.max_distance,
        "feed_forward_proj": feed_forward,
        "tie_word_embeddings": c.tied_embeddings,
        "dropout_rate": c.dropout_rate,
        "layer_norm_epsilon": c.norm_epsilon,
        "is_encoder_decoder": True,
    }


def table(config: T5Config) -> Table:
    """`T5ForConditionalGeneration`."""
    rows = {"embed/table": Tensor("shared.weight")}
    if not config.tied_embeddings:
        rows["head/table"] = Tensor("lm_head.weight")
    return {**rows, **side(config, "encoder"), **side(config, "decoder")}


def side(config: T5Config, name: str) -> Table:
    """The encoder or the decoder.

    Their scores are not divided by sqrt(head_dim), so our queries are more.
    """
    sublayers = [one for one in SUBLAYERS if name == "decoder" or one != "cross_attention"]
    attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
    mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    if config.feed_forward == "relu":
        mlp = {"up": "wi", "down": "wo"}
    rows = {
        f"{name}/final_norm/scale": Tensor(f"{name}.final_layer_norm.weight"),
        f"{name}/relative_bias/table": Tensor(
            f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
    }
    for number, ours in enumerate(sublayers):
        block, layer = f"{name}/blocks/{ours}", f"{name}.block.{{}}.layer.{number}"
        rows[f"{block}_norm/scale"] = Tensor(f"{layer}.layer_norm.weight")
        for linear, short in (mlp if ours == "mlp" else attention).items():
            rows[f"{block}/{linear}/kernel"] = Tensor(
                f"{layer}.{SUBLAYERS[ours]}.{short}.weight",
                transposed=True,
                scale=config.head_dim**0.5 if linear == "query" else 1.0,
            )
    return rows


def tied(config: T5Config) -> dict[str, str]:
    """The tables that are one."""
    again = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if config.tied_embeddings:
        again.append("lm_head.weight")
    return dict.fromkeys(again, "shared.weight")


def limits(config: T5Config) -> dict[str, int]:
    """Rows of the table of tokens."""
    return {"input_ids": config.vocab_size, "decoder_input_ids": config.vocab_size}


class EncoderOnly(T5):
    """The encoder and its table of tokens: nothing else is called, so nothing else is made."""

    def __call__(  # type: ignore[override]
        self, source: Int[Array, "B S"], source_mask: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        return self.encode(source, source_mask)


def encoder_config(theirs: Settings) -> T5Config:
    """Of `T5EncoderModel`, whose folders may say of the decoder what they like."""
    return config({**theirs, "tie_word_embeddings": True, "scale_decoder_outputs": True})


def encoder_settings(config: T5Config) -> dict[str, Any]:
    """`T5EncoderModel`'s."""
    found = {**settings(config), "is_encoder_decoder": False}
    return {key: value for key, value in found.items() if key != "tie_word_embeddings"}


def encoder_table(config: T5Config) -> Table:
    """`T5EncoderModel`."""
    return {"embed/table": Tensor("shared.weight"), **side(config, "encoder")}


def call_encoder(
    module: nn.Module, params: Params, input_ids: Any, attention_mask: Any = None
) -> dict[str, jax.Array]:
    """What the encoder returns.

    Args:
      module: an `EncoderOnly`.
      params: its parameters.
      input_ids: the source, [B, S].
      attention_mask: 0 for padding, [B, S].
    """
    mask = None if attention_mask is None else attention_mask.astype(bool)
    encoded: Any = module.apply({"params": params}, input_ids, mask)
    return {"last_hidden_state": encoded.astype(jnp.float32)}


SHARED: dict[str, Any] = dict(
    settings=settings,
    table=table,
    module=T5,
    call=marian.call,
    limits=limits,
    ignored=("EncDecAttention.relative_attention_bias.weight",),
    tied=tied,
    example=(TOKENS, TOKENS),
)
CONDITIONAL = Architecture(
    model_type="t5", name="T5ForConditionalGeneration", config=config, **SHARED
)
ENCODER = Architecture(
    model_type="t5",
    name="T5EncoderModel",
    config=encoder_config,
    settings=encoder_settings,
    table=encoder_table,
    module=EncoderOnly,
    call=call_encoder,
    limits=lambda config: {"input_ids": config.vocab_size},
    tied=lambda config: {"encoder.embed_tokens.weight": "shared.weight"},
)
MT5 = Architecture(
    model_type="mt5", name="MT5ForConditionalGeneration", config=mt5_config, **SHARED
)
ARCHITECTURES = (CONDITIONAL, without_head(CONDITIONAL, "T5Model"), ENCODER, MT5)
