"""The same GPT and the same step in plain eager PyTorch: what most people would write.

Pre-norm blocks, one product for query, key and value, fused attention, a tied head and fused
cross-entropy, as in nanoGPT (Karpathy 2022).
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lineage_jax.models.gpt import GPTConfig
from lineage_jax.train.optim import OptimizerConfig


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(width, config.norm_epsilon)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, config.norm_epsilon)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            heads.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for heads in self.qkv(self.attention_norm(x)).split(width, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.positions = nn.Embedding(config.max_len, config.embed_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.embed_dim, config.norm_epsilon)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, targets):
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def load(model: GPT, params: dict[str, np.ndarray]) -> None:
    """Copies this repository's parameters, under their paths ("blocks/mlp/up/kernel"), into it."""

    def copy(to, path, layer=None):
        value = params[path] if layer is None else params[path][layer]
        value = value.reshape(-1, to.shape[0]).T if path.endswith("kernel") else value
        to.copy_(torch.from_numpy(np.ascontiguousarray(value)).reshape(to.shape))

    copy(model.embed.weight, "embed/table")
    copy(model.positions.weight, "positions/table")
    copy(model.final_norm.weight, "final_norm/scale")
    copy(model.final_norm.bias, "final_norm/bias")
    blocks: Any = enumerate(model.blocks)
    for layer, block in blocks:
        for name in ("attention_norm", "mlp_norm"):
            copy(getattr(block, name).weight, f"blocks/{name}/scale", layer)
            copy(getattr(block, name).bias, f"blocks/{name}/bias", layer)
        linears = {"attention/out": block.out, "mlp/up": block.up, "mlp/down": block.down}
        for name, linear in linears.items():
            copy(linear.weight, f"blocks/{name}/kernel", layer)
            copy(linear.bias, f"blocks/{name}/bias", layer)
        weights, biases = block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)
        for third, name in enumerate(("query", "key", "value")):
            copy(weights[third], f"blocks/attention/{name}/kernel", layer)
            copy(biases[third], f"blocks/attention/{name}/bias", layer)


class Trainer:
    """Takes steps of AdamW with gradients clipped by their global norm."""

    def __init__(
        self,
        config: GPTConfig,
        optimizer: OptimizerConfig,
        params: dict[str, np.ndarray],
        *,
        fused: bool,
    ):
        self.model = GPT(config)
        load(self.model, params)
        weights = list(self.model.parameters())
        groups = [
            dict(params=[w for w in weights if w.ndim > 1], weight_decay=optimizer.weight_decay),
            dict(params=[w for w in weights if w.ndim == 1], weight_decay=0.0),
        ]
        betas, rate = (optimizer.b1, optimizer.b2), optimizer.learning_rate
        self.adamw = torch.optim.AdamW(
            groups, lr=rate, betas=betas, eps=optimizer.epsilon, fused=fused or None
        )
        self.max_grad_norm = optimizer.max_grad_norm or math.inf

    def step(self, tokens: np.ndarray) -> float:
        """One step on rows of T + 1 tokens; returns its loss, nats per token."""
        rows = torch.from_numpy(tokens).long()
        loss = self.model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss.item()
