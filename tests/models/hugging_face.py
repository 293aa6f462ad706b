"""Parameters under their Hugging Face names, as ours: one table for each architecture.

The conversion is made of `jax.numpy` alone, so that a gradient with respect to their tensors is
`jax.grad` through it: fused, transposed, scaled and tied parameters need no rule of their own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from lineage_jax.models import gpt, llama
from lineage_jax.models.gpt import GPTConfig
from lineage_jax.models.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one of our parameters is found.

    Attributes:
      name: theirs, with {} for the layer's number where there is one per layer.
      transposed: whether theirs is (outputs, inputs), as `torch.nn.Linear` holds it.
      third: which third of theirs, along its last axis, ours is.
      scale: ours is theirs times this.
    """

    name: str
    transposed: bool = False
    third: int | None = None
    scale: float = 1.0

    def read(self, tensors: Mapping[str, jax.Array], layer: int | None = None) -> jax.Array:
        """Ours, but for the split of its axes."""
        tensor = jnp.asarray(tensors[self.name.format(layer)])
        if self.transposed:
            tensor = tensor.T
        if self.third is not None:
            tensor = jnp.split(tensor, 3, axis=-1)[self.third]
        return self.scale * tensor


Table = Mapping[str, Tensor]
"""Our path of a parameter, joined by slashes -> where it is found."""


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


def gpt1(config: GPTConfig) -> Table:
    """`OpenAIGPTLMHeadModel`."""
    return {
        "embed/table": Tensor("transformer.tokens_embed.weight"),
        "positions/table": Tensor("transformer.positions_embed.weight"),
        **fused_block("transformer.h.{}"),
    }


def gpt2(config: GPTConfig) -> Table:
    """`GPT2LMHeadModel`."""
    return {
        "embed/table": Tensor("transformer.wte.weight"),
        "positions/table": Tensor("transformer.wpe.weight"),
        "final_norm/scale": Tensor("transformer.ln_f.weight"),
        "final_norm/bias": Tensor("transformer.ln_f.bias"),
        **fused_block("transformer.h.{}"),
    }


def gpt_neo(config: GPTConfig) -> Table:
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
        "embed/table": Tensor("transformer.wte.weight"),
        "positions/table": Tensor("transformer.wpe.weight"),
        "final_norm/scale": Tensor("transformer.ln_f.weight"),
        "final_norm/bias": Tensor("transformer.ln_f.bias"),
        **norms(f"{block}.ln_1", f"{block}.ln_2"),
        **attention,
        **linears,
    }


def llama_table(config: LlamaConfig) -> Table:
    """`LlamaForCausalLM`."""
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


def gpt_config(theirs: Mapping[str, Any]) -> GPTConfig:
    """Our config, from theirs as config.json spells it."""
    if theirs["model_type"] == "gpt_neo":
        return GPTConfig(
            num_layers=theirs["num_layers"],
            embed_dim=theirs["hidden_size"],
            num_heads=theirs["num_heads"],
            vocab_size=theirs["vocab_size"],
            max_len=theirs["max_position_embeddings"],
            mlp_dim=theirs["intermediate_size"],
            local_window=theirs["window_size"],
            norm_epsilon=theirs["layer_norm_epsilon"],
        )
    return GPTConfig(
        num_layers=theirs["n_layer"],
        embed_dim=theirs["n_embd"],
        num_heads=theirs["n_head"],
        vocab_size=theirs["vocab_size"],
        max_len=theirs["n_positions"],
        mlp_dim=theirs.get("n_inner"),
        norm_first=theirs["model_type"] != "openai-gpt",
        norm_epsilon=theirs["layer_norm_epsilon"],
    )


def llama_config(theirs: Mapping[str, Any]) -> LlamaConfig:
    """Our config, from theirs as config.json spells it."""
    return LlamaConfig(
        num_layers=theirs["num_hidden_layers"],
        embed_dim=theirs["hidden_size"],
        num_heads=theirs["num_attention_heads"],
        num_kv_heads=theirs["num_key_value_heads"],
        head_dim=theirs["head_dim"],
        mlp_dim=theirs["intermediate_size"],
        vocab_size=theirs["vocab_size"],
        max_len=theirs["max_position_embeddings"],
        rope_base=theirs["rope_parameters"]["rope_theta"],
        tied_embeddings=theirs["tie_word_embeddings"],
        norm_epsilon=theirs["rms_norm_eps"],
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one of theirs is one of ours.

    Attributes:
      config: ours from theirs.
      table: where each of our parameters is found.
      module: builds our model of a config.
    """

    config: Callable[[Mapping[str, Any]], Any]
    table: Callable[[Any], Table]
    module: Callable[[Any], nn.Module]


ARCHITECTURES: Mapping[str, Architecture] = {
    "openai-gpt": Architecture(gpt_config, gpt1, gpt.GPT),
    "gpt2": Architecture(gpt_config, gpt2, gpt.GPT),
    "gpt_neo": Architecture(gpt_config, gpt_neo, gpt.GPT),
    "llama": Architecture(llama_config, llama_table, llama.Llama),
}
"""By the `model_type` of their config.json."""


def from_hugging_face(
    model_type: str, config: Any, tensors: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Our parameters, from their tensors.

    Raises:
      ValueError: if a tensor there is wanted by no parameter of ours.
    """
    architecture = ARCHITECTURES[model_type]
    table = architecture.table(config)
    layers = range(config.num_layers)
    wanted = {row.name.format(layer) for row in table.values() for layer in layers}
    if unused := sorted(set(tensors) - wanted):
        raise ValueError(f"no parameter of {model_type} is called {', '.join(unused)}")

    def read(path, shape):
        if path not in table:  # a bias that they do not have
            assert path.endswith("bias"), path
            return jnp.zeros(shape)
        row = table[path]
        if not path.startswith("blocks/"):
            return row.read(tensors).reshape(shape)
        return jnp.stack([row.read(tensors, layer) for layer in layers]).reshape(shape)

    ours = shapes(architecture.module(config))
    return unflatten_dict({p: read(p, x.shape) for p, x in ours.items()}, sep="/")


@functools.cache
def shapes(module: nn.Module) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Our parameters by their paths."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)
    return flatten_dict(meta.unbox(variables["params"]), sep="/")
