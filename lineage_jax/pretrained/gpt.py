"""GPT-1 and GPT-2, as classifiers too, and GPT-Neo, whose layers alternate as GPT-3's do."""

import dataclasses
import math
from typing import Any

import jax
from flax import linen as nn

from lineage_jax.models.gpt import GPT, Classifier, ClassifierConfig, GPTConfig
from lineage_jax.pretrained import decoder
from lineage_jax.pretrained.architecture import (
    Architecture,
    Settings,
    check,
    check_reads,
    tied,
    without_head,
)
from lineage_jax.pretrained.tensors import Table, Tensor
from lineage_jax.typing import Params

TANH = ("gelu_new", "gelu_pytorch_tanh")
"""What they call the GELU by a hyperbolic tangent, which is ours."""


def gpt1_config(theirs: Settings) -> GPTConfig:
    """Of `OpenAIGPTLMHeadModel`."""
    check(theirs, afn=("gelu", *TANH))  # its "gelu" is the one by a hyperbolic tangent
    return _config(theirs, norm_first=False)


def gpt2_config(theirs: Settings) -> GPTConfig:
    """Of `GPT2LMHeadModel`."""
    check(
        theirs,
        activation_function=TANH,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return _config(theirs, mlp_dim=theirs.get("n_inner"))


def _config(theirs: Settings, **ours: Any) -> GPTConfig:
    return GPTConfig(
        num_layers=theirs["n_layer"],
        embed_dim=theirs["n_embd"],
        num_heads=theirs["n_head"],
        vocab_size=theirs["vocab_size"],
        max_len=theirs["n_positions"],
        dropout_rate=theirs.get("resid_pdrop", 0.1),
        norm_epsilon=theirs.get("layer_norm_epsilon", 1e-5),
        tied_embeddings=theirs.get("tie_word_embeddings", True),
        **ours,
    )


def gpt_neo_config(theirs: Settings) -> GPTConfig:
    """Of `GPTNeoForCausalLM`.

    Raises:
      ValueError: if its layers are neither all global nor global and local in turn.
    """
    check(theirs, activation_function=TANH)
    num_layers = theirs["num_layers"]
    kinds = [kind for kinds, times in theirs["attention_types"] for kind in times * kinds]
    alternate = kinds == (["global", "local"] * num_layers)[:num_layers]
    if not alternate and kinds != ["global"] * num_layers:
        raise ValueError(
            f"wanted attention_types all global, or global and local in turn, got {kinds}"
        )
    return GPTConfig(
        num_layers=num_layers,
        embed_dim=theirs["hidden_size"],
        num_heads=theirs["num_heads"],
        vocab_size=theirs["vocab_size"],
        max_len=theirs["max_position_embeddings"],
        mlp_dim=theirs.get("intermediate_size"),
        local_window=theirs.get("window_size", 256) if alternate else None,
        dropout_rate=theirs.get("resid_dropout", 0.0),
        norm_epsilon=theirs.get("layer_norm_epsilon", 1e-5),
        tied_embeddings=theirs.get("tie_word_embeddings", True),
    )


def settings(config: GPTConfig) -> dict[str, Any]:
    """GPT-1's and GPT-2's.

    Raises:
      ValueError: for what their classes have no setting for.
    """
    c = config
    check_reads(c)
    if c.local_window is not None:
        raise ValueError(f"GPT-2 has no local layers, got local_window={c.local_window}")
    check_heads(c)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout_rate)
    return {
        "n_layer": c.num_layers,
        "n_embd": c.embed_dim,
        "n_head": c.num_heads,
        "n_positions": c.max_len,
        "vocab_size": c.vocab_size,
        "layer_norm_epsilon": c.norm_epsilon,
        "tie_word_embeddings": c.tied_embeddings,
        **dropouts,
    }


def gpt1_settings(config: GPTConfig) -> dict[str, Any]:
    """GPT-1's.

    Raises:
      ValueError: for a feed-forward layer that is not four times as wide as the stream.
    """
    if config.mlp_dim not in (None, 4 * config.embed_dim):
        raise ValueError(
            f"wanted mlp_dim {4 * config.embed_dim}, four widths, got {config.mlp_dim}"
        )
    return {**settings(config), "afn": "gelu"}


def gpt2_settings(config: GPTConfig) -> dict[str, Any]:
    """GPT-2's."""
    return {
        **settings(config),
        "n_inner": config.mlp_dim,
        "activation_function": "gelu_new",
    }


def gpt_neo_settings(config: GPTConfig) -> dict[str, Any]:
    """GPT-Neo's."""
    c = config
    check_reads(c)
    check_heads(c)
    kinds = [
        "global" if c.local_window is None or i % 2 == 0 else "local" for i in range(c.num_layers)
    ]
    return {
        "num_layers": c.num_layers,
        "hidden_size": c.embed_dim,
        "num_heads": c.num_heads,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_len,
        "intermediate_size": c.mlp_dim,
        "window_size": c.local_window or 256,
        "attention_types": [[[kind], 1] for kind in kinds],
        "layer_norm_epsilon": c.norm_epsilon,
        "activation_function": "gelu_new",
        "tie_word_embeddings": c.tied_embeddings,
        **dict.fromkeys(("resid_dropout", "embed_dropout", "attention_dropout"), c.dropout_rate),
    }


def check_heads(config: GPTConfig) -> None:
    """Refuses heads that are not width / heads wide."""
    c = config
    if c.head_dim is not None and c.head_dim * c.num_heads != c.embed_dim:
        raise ValueError(
            f"wanted heads of {c.embed_dim} / {c.num_heads}, got head_dim={c.head_dim}"
        )


def norms(first: str, second: str) -> Table:
    """The two norms of a block."""
    return {
        f"blocks/{ours}/{kind}": Tensor(f"{theirs}.{'weight' if kind == 'scale' else kind}")
        for ours, theirs in (("attention_norm", first), ("mlp_norm", second))
        for kind in ("scale", "bias")
    }


def fused_block(prefix: str) -> Table:
    """A block of GPT-1 and GPT-2: kernels (inputs, outputs); query, key and value in one."""
    rows = dict(norms(f"{prefix}.ln_1", f"{prefix}.ln_2"))
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        for third, name in enumerate(("query", "key", "value")):
            rows[f"blocks/attention/{name}/{ours}"] = Tensor(
                f"{prefix}.attn.c_attn.{theirs}", third=third
            )
        rows[f"blocks/attention/out/{ours}"] = Tensor(f"{prefix}.attn.c_proj.{theirs}")
        rows[f"blocks/mlp/up/{ours}"] = Tensor(f"{prefix}.mlp.c_fc.{theirs}")
        rows[f"blocks/mlp/down/{ours}"] = Tensor(f"{prefix}.mlp.c_proj.{theirs}")
    return rows


def around(config: GPTConfig, tokens: str, positions: str) -> Table:
    """The tables and the last norm, around the blocks."""
    rows = {"embed/table": Tensor(tokens), "positions/table": Tensor(positions)}
    if config.norm_first:
        rows["final_norm/scale"] = Tensor("transformer.ln_f.weight")
        rows["final_norm/bias"] = Tensor("transformer.ln_f.bias")
    if not config.tied_embeddings:
        rows["head/table"] = Tensor("lm_head.weight")
    return rows


def gpt1_table(config: GPTConfig) -> Table:
    """`OpenAIGPTLMHeadModel`."""
    names = "transformer.tokens_embed.weight", "transformer.positions_embed.weight"
    return {**around(config, *names), **fused_block("transformer.h.{}")}


def gpt2_table(config: GPTConfig) -> Table:
    """`GPT2LMHeadModel`."""
    names = "transformer.wte.weight", "transformer.wpe.weight"
    return {**around(config, *names), **fused_block("transformer.h.{}")}


def gpt_neo_table(config: GPTConfig) -> Table:
    """`GPTNeoForCausalLM`: its scores are not divided by sqrt(head_dim), so our queries are more.

    It has no biases in query, key and value; ours are then zero.
    """
    block, head_dim = "transformer.h.{}", config.embed_dim // config.num_heads
    attention = {
        f"blocks/attention/{name}/kernel": Tensor(
            f"{block}.attn.attention.{name[0]}_proj.weight",
            transposed=True,
            scale=math.sqrt(head_dim) if name == "query" else 1.0,
        )
        for name in ("query", "key", "value")
    }
    linears = {
        f"blocks/{ours}/{kind}": Tensor(
            f"{block}.{theirs}.{'weight' if kind == 'kernel' else kind}",
            transposed=kind == "kernel",
        )
        for ours, theirs in (
            ("attention/out", "attn.attention.out_proj"),
            ("mlp/up", "mlp.c_fc"),
            ("mlp/down", "mlp.c_proj"),
        )
        for kind in ("kernel", "bias")
    }
    return {
        **around(config, "transformer.wte.weight", "transformer.wpe.weight"),
        **norms(f"{block}.ln_1", f"{block}.ln_2"),
        **attention,
        **linears,
    }


def limits(config: GPTConfig) -> dict[str, int]:
    """Rows of the tables of tokens and positions."""
    return {"input_ids": config.vocab_size, "position_ids": config.max_len}


SHARED: dict[str, Any] = dict(
    module=GPT,
    call=decoder.call,
    limits=limits,
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"),
)
GPT1 = Architecture(
    model_type="openai-gpt",
    name="OpenAIGPTLMHeadModel",
    config=gpt1_config,
    settings=gpt1_settings,
    table=gpt1_table,
    tied=tied("transformer.tokens_embed.weight"),
    **SHARED,
)
GPT2 = Architecture(
    model_type="gpt2",
    name="GPT2LMHeadModel",
    config=gpt2_config,
    settings=gpt2_settings,
    table=gpt2_table,
    tied=tied("transformer.wte.weight"),
    **SHARED,
)
GPT_NEO = Architecture(
    model_type="gpt_neo",
    name="GPTNeoForCausalLM",
    config=gpt_neo_config,
    settings=gpt_neo_settings,
    table=gpt_neo_table,
    tied=tied("transformer.wte.weight"),
    **SHARED,
)


def classifier(architecture: Architecture, name: str) -> Architecture:
    """Their class of the same model that scores the labels of each row at its last token.

    Args:
      architecture: of the language model, whose head is its table of tokens.
      name: of their class.
    """

    def config(theirs: Settings) -> ClassifierConfig:
        ours = vars(architecture.config({**theirs, "tie_word_embeddings": True}))
        num_labels = theirs.get("num_labels") or len(theirs.get("id2label") or "01")
        return ClassifierConfig(**ours, num_labels=num_labels)

    def settings(config: ClassifierConfig) -> dict[str, Any]:
        return {**architecture.settings(config), "num_labels": config.num_labels}

    def table(config: ClassifierConfig) -> Table:
        rows = {f"gpt/{path}": row for path, row in architecture.table(config).items()}
        return {**rows, "classifier/kernel": Tensor("score.weight", transposed=True)}

    return dataclasses.replace(
        architecture,
        name=name,
        config=config,
        settings=settings,
        table=table,
        module=Classifier,
        call=classified,
        tied=lambda config: {},
    )


def classified(
    module: nn.Module,
    params: Params,
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
) -> dict[str, jax.Array]:
    """Scores of the labels, read at the last token that is no padding.

    Theirs takes that to be the last that is not `pad_token_id`; so pad with that id, and mask it.

    Args:
      module: with the call of `Classifier`.
      params: its parameters.
      input_ids: [B, T].
      attention_mask: 0 for padding, [B, T].
      position_ids: [B, T]; 0 ... T - 1 if not given.
    """
    mask = None if attention_mask is None else attention_mask.astype(bool)
    logits, _ = module.apply({"params": params}, input_ids, mask, positions=position_ids)
    return {"logits": logits}


ARCHITECTURES = (
    GPT1,
    without_head(GPT1, "OpenAIGPTModel"),
    classifier(GPT1, "OpenAIGPTForSequenceClassification"),
    GPT2,
    without_head(GPT2, "GPT2Model"),
    classifier(GPT2, "GPT2ForSequenceClassification"),
    GPT_NEO,
    without_head(GPT_NEO, "GPTNeoModel"),
)
