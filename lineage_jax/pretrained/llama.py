"""LLaMA with rotations scaled or not, and Mistral."""

from typing import Any

from lineage_jax.models.llama import Llama, LlamaConfig, head_dim
from lineage_jax.nn import RopeScaling
from lineage_jax.pretrained import decoder
from lineage_jax.pretrained.architecture import Architecture, Settings, check, tied, without_head
from lineage_jax.pretrained.tensors import Table, Tensor


def llama_config(theirs: Settings) -> LlamaConfig:
    """Of `LlamaForCausalLM`."""
    check(theirs, attention_bias=False, mlp_bias=False)
    return _config(theirs)


def mistral_config(theirs: Settings) -> LlamaConfig:
    """Of `MistralForCausalLM`."""
    return _config(theirs, window=theirs.get("sliding_window"))


def _config(theirs: Settings, **ours: Any) -> LlamaConfig:
    check(theirs, hidden_act=("silu", "swish"))
    base, scaling = rotations(theirs)
    num_heads = theirs["num_attention_heads"]
    return LlamaConfig(
        num_layers=theirs["num_hidden_layers"],
        embed_dim=theirs["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=theirs.get("num_key_value_heads") or num_heads,
        head_dim=theirs.get("head_dim"),
        mlp_dim=theirs["intermediate_size"],
        vocab_size=theirs["vocab_size"],
        max_len=theirs["max_position_embeddings"],
        rope_base=base,
        rope_scaling=scaling,
        tied_embeddings=theirs.get("tie_word_embeddings", False),
        norm_epsilon=theirs.get("rms_norm_eps", 1e-6),
        **ours,
    )


def rotations(theirs: Settings) -> tuple[float, RopeScaling]:
    """The base of the rotations, and what slows them.

    Folders written before transformers 5 say it in `rope_theta` and `rope_scaling`.

    Raises:
      ValueError: for a kind of scaling that we do not have.
    """
    given = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    base = float(given.get("rope_theta") or theirs.get("rope_theta") or 10_000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return base, RopeScaling()
    if kind == "linear":
        return base, RopeScaling(factor=float(given["factor"]))
    if kind == "llama3":
        return base, RopeScaling(
            factor=float(given["factor"]),
            trained_len=given["original_max_position_embeddings"],
            slow_turns=float(given["low_freq_factor"]),
            fast_turns=float(given["high_freq_factor"]),
        )
    raise ValueError(f"wanted rope_type 'default', 'linear' or 'llama3', got {kind!r}")


def llama_settings(config: LlamaConfig) -> dict[str, Any]:
    """LLaMA's.

    Raises:
      ValueError: if the layers read a window.
    """
    if config.window is not None:
        raise ValueError(f"LLaMA's layers read all, and Mistral's a window={config.window}")
    return {**_settings(config), "attention_bias": False, "mlp_bias": False}


def mistral_settings(config: LlamaConfig) -> dict[str, Any]:
    """Mistral's."""
    return {**_settings(config), "sliding_window": config.window}


def _settings(config: LlamaConfig) -> dict[str, Any]:
    c, scaling = config, config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_base}
    if scaling.trained_len is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.trained_len,
            "low_freq_factor": scaling.slow_turns,
            "high_freq_factor": scaling.fast_turns,
        }
    elif scaling.factor != 1:
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    return {
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": head_dim(c),
        "intermediate_size": c.mlp_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_len,
        "rms_norm_eps": c.norm_epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": c.tied_embeddings,
        "rope_parameters": rope,
        # As folders said it before transformers 5.
        "rope_theta": c.rope_base,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }


def table(config: LlamaConfig) -> Table:
    """`LlamaForCausalLM` and `MistralForCausalLM`."""
    block = "model.layers.{}"
    norms = {
        f"blocks/{ours}/scale": Tensor(f"{block}.{theirs}_layernorm.weight")
        for ours, theirs in (("attention_norm", "input"), ("mlp_norm", "post_attention"))
    }
    linears = {
        f"blocks/{ours}/kernel": Tensor(f"{block}.{theirs}_proj.weight", transposed=True)
        for ours, theirs in (
            ("attention/query", "self_attn.q"),
            ("attention/key", "self_attn.k"),
            ("attention/value", "self_attn.v"),
            ("attention/out", "self_attn.o"),
            ("mlp/gate", "mlp.gate"),
            ("mlp/up", "mlp.up"),
            ("mlp/down", "mlp.down"),
        )
    }
    head = {} if config.tied_embeddings else {"head/table": Tensor("lm_head.weight")}
    return {
        "embed/table": Tensor("model.embed_tokens.weight"),
        "final_norm/scale": Tensor("model.norm.weight"),
        **norms,
        **linears,
        **head,
    }


def limits(config: LlamaConfig) -> dict[str, int]:
    """Rows of the table of tokens."""
    return {"input_ids": config.vocab_size}


SHARED: dict[str, Any] = dict(
    table=table,
    module=Llama,
    call=decoder.call,
    limits=limits,
    prefix="model.",
    ignored=("rotary_emb.inv_freq",),
    tied=tied("model.embed_tokens.weight"),
)
LLAMA = Architecture(
    model_type="llama",
    name="LlamaForCausalLM",
    config=llama_config,
    settings=llama_settings,
    **SHARED,
)
MISTRAL = Architecture(
    model_type="mistral",
    name="MistralForCausalLM",
    config=mistral_config,
    settings=mistral_settings,
    **SHARED,
)
ARCHITECTURES = (
    LLAMA,
    without_head(LLAMA, "LlamaModel"),
    MISTRAL,
    without_head(MISTRAL, "MistralModel"),
)
