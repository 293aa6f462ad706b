# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # LLaMA from GPT, one change at a time
#
# Five years lie between GPT-1 (2018) and LLaMA (2023), and a handful of changes to one block. Here
# you make them one by one, train each model for the same updates on the same text, and see what
# each costs in parameters, in memory and in loss. It runs on a CPU in three minutes.

# %%
# In Colab, first:  !pip install -q git+https://github.com/lineage-jax/lineage_jax
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from IPython.display import SVG
from matplotlib.figure import Figure

from experiments import gpt, language, llama
from experiments.difference import difference
from experiments.study import Recipe, train
from lineage_jax.data.text import TextData, load_text
from lineage_jax.models.gpt import GPT
from lineage_jax.models.llama import Llama
from lineage_jax.nn import (
    MLP,
    Attention,
    Embed,
    GatedMLP,
    LayerNorm,
    RMSNorm,
    decoder_mask,
    rotate,
)
from lineage_jax.train.optim import OptimizerConfig
from scaling.plots import to_svg

# %% [markdown]
# ## 1. What changed, in the project's own words
#
# `lineage diff gpt llama` compares two milestones at one size. These are the settings and the
# costs; it lists parameters too.

# %%
for row in difference("gpt", "llama"):
    if row.part in ("settings", "cost"):
        print(f"{row.name:>28}   {row.left:<22} {row.right}")

# %% [markdown]
# ## 2. One block, four switches
#
# The milestones' own files have no switches, on purpose: two files that can be laid side by side
# are easier to read than one with flags. For an experiment, a block with switches is what you want,
# and the layers to make it from are there.


# %%
@dataclasses.dataclass(frozen=True)
class Config:
    """GPT-2 as it stands; LLaMA with every switch on."""

    rms_norm: bool = False
    gated: bool = False
    """And no biases, as in LLaMA."""
    rotary: bool = False
    grouped: bool = False
    num_layers: int = 3
    embed_dim: int = 64
    num_heads: int = 4
    vocab_size: int = 257
    max_len: int = 128

    @property
    def mlp_dim(self):
        """4 D; two thirds of it where there are three matrices, so that they weigh the same."""
        return 4 * self.embed_dim * 2 // 3 if self.gated else 4 * self.embed_dim


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, positions, mask):
        c = self.config
        norm = RMSNorm if c.rms_norm else LayerNorm
        mlp = GatedMLP if c.gated else MLP
        attention = Attention(
            num_heads=c.num_heads,
            num_kv_heads=c.num_heads // 2 if c.grouped else c.num_heads,
            head_dim=c.embed_dim // c.num_heads,
            stddev=0.02,
            out_stddev=0.02,
            use_bias=not c.gated,
            place=functools.partial(rotate, base=10_000.0) if c.rotary else None,
        )
        x = x + attention(norm()(x), mask, positions)[0]
        return x + mlp(c.mlp_dim, nn.silu if c.gated else nn.gelu, 0.02, 0.02)(norm()(x))


class Decoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens, positions=None, segment_ids=None, train=False):
        c = self.config
        positions, mask = decoder_mask(tokens.shape[1], c.max_len, positions, segment_ids, None)
        embed = Embed(c.vocab_size, c.embed_dim)
        x = embed(tokens)
        if not c.rotary:
            x = x + Embed(c.max_len, c.embed_dim, "position")(positions)
        for _ in range(c.num_layers):
            x = Block(c)(x, positions, mask)
        return embed.attend((RMSNorm if c.rms_norm else LayerNorm)()(x)), None


# %% [markdown]
# ## 3. One change at a time
#
# Each line adds one change to the line before. Everything else is equal: the text (the prose and
# source code that every Python carries, as bytes), the batches, the schedule, the seed.

# %%
steps = {"GPT-2": {}}
for change in ("rms_norm", "gated", "rotary", "grouped"):
    steps[f"+ {change}"] = {**list(steps.values())[-1], change: True}

text = load_text(TextData(seq_len=128, batch_size=16, heldout_fraction=0.01))
optimizer = OptimizerConfig(learning_rate=5e-3, warmup_steps=30)
UPDATES = 200


def measured(module, params, batches=20):
    """Held-out cross-entropy in bits per byte."""
    loss_fn = language.loss_fn(module, train=False)
    evaluate = jax.jit(lambda batch: loss_fn(params, {}, batch, jax.random.key(0))[1][1]["loss"])
    pairs = np.array([evaluate(text.heldout(step)) for step in range(batches)])
    total, count = pairs.sum(0)
    return total / count / np.log(2)


losses = {}
for name, switches in steps.items():
    module = Decoder(Config(**switches))
    recipe = Recipe(
        module=module,
        init=language.init,
        loss_fn=language.loss_fn,
        optimizer=optimizer,
    )
    params = train(recipe, text.train.stack, seed=0, peak=optimizer.learning_rate, updates=UPDATES)
    losses[name] = measured(module, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    kv_heads = 2 if switches.get("grouped") else 4
    cache = 2 * 4 * module.config.num_layers * kv_heads * 16  # keys and values, four bytes each
    print(
        f"{name:>11}: {size:>7,} parameters, {cache:>5,} bytes of cache a token, "
        f"{losses[name]:.3f} bits per byte"
    )

# %%
figure = Figure(figsize=(5.6, 2.6), layout="constrained")
axes = figure.subplots()
axes.plot(list(losses.values()), list(losses), marker="o", color="#3a6ea5")
axes.invert_yaxis()
axes.set_xlabel(f"bits per byte of held-out text after {UPDATES} updates")
axes.spines[["top", "right"]].set_visible(False)
SVG(to_svg(figure))

# %% [markdown]
# One seed and one learning rate prove little: differences of a hundredth are noise here. Rotary
# positions usually stand out at this length of training, as a learned table must first be learned;
# grouped queries are not there for the loss but for the cache, which is halved.
#
# ## 4. With every switch on, it is LLaMA
#
# The same weights, moved to `lineage_jax.models.llama`, give the same scores to the last bits of
# float32. (That the model file itself is LLaMA, the tests show against another library.)

# %%
module = Decoder(Config(rms_norm=True, gated=True, rotary=True, grouped=True))
c = module.config
whole = Llama(
    dataclasses.replace(
        llama.tiny().model,
        num_layers=c.num_layers,
        embed_dim=c.embed_dim,
        num_heads=c.num_heads,
        num_kv_heads=c.num_heads // 2,
        mlp_dim=c.mlp_dim,
        vocab_size=c.vocab_size,
        max_len=c.max_len,
        tied_embeddings=True,
        norm_epsilon=1e-5,
    )
)
blocks = [params[f"Block_{i}"] for i in range(c.num_layers)]
moved = {
    "embed": params["Embed_0"],
    "final_norm": params["RMSNorm_0"],
    "blocks": jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(
            {
                "attention_norm": block["RMSNorm_0"],
                "attention": block["Attention_0"],
                "mlp_norm": block["RMSNorm_1"],
                "mlp": block["GatedMLP_0"],
            }
            for block in blocks
        ),
    ),
}
tokens = jnp.asarray(text.heldout(0)["tokens"])
ours, _ = jax.jit(lambda tokens: module.apply({"params": params}, tokens))(tokens)
theirs, _ = jax.jit(lambda tokens: whole.apply({"params": moved}, tokens))(tokens)
print(f"largest difference of {ours.size:,} scores: {jnp.abs(ours - theirs).max():.1e}")

# %% [markdown]
# ## 5. Only distance matters
#
# Rotary positions turn queries and keys by angles that grow with their place; the score of two of
# them depends on how far apart they are, and on nothing else. So a text that begins at position 70
# is scored as if it began at 0. A learned table has no such property.

# %%
short = tokens[:2, :48]
learned = GPT(gpt.tiny().model)
random = jax.jit(learned.init)(jax.random.key(0), short)["params"]
for name, model, weights in (("LLaMA", whole, moved), ("GPT", learned, nn.unbox(random))):
    score, places = jax.jit(model.apply), jnp.arange(48)[None].repeat(2, 0)
    first, shifted = (score({"params": weights}, short, places + start)[0] for start in (0, 70))
    print(
        f"{name:>6}: largest difference of a score, shifted: {jnp.abs(first - shifted).max():.1e}"
    )

# %% [markdown]
# ## 6. Try it
#
# - Turn on one switch alone. Do the gains add up?
# - `lineage diff gpt llama --preset tiny` in a terminal; then `lineage diff transformer gpt`.
# - Give the rotary model longer rows than it was trained on (`max_len`), then interpolate positions
#   (`RopeScaling` in `lineage_jax.nn`).
# - `lineage train llama --preset tiny`, then `lineage generate runs/llama-tiny --prompt "def "`.
