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
# # Native Sparse Attention: reading little, and learning what
#
# A query of full attention reads every key behind it, so a text twice as long takes four times the
# work. Native Sparse Attention (Yuan et al. 2025, https://arxiv.org/abs/2502.11089) reads three
# small parts instead, and is trained that way from the first step. Here you see what each part
# reads, train it beside full attention, and count. It runs on a CPU in three minutes.

# %%
# In Colab, first:  !pip install -q git+https://github.com/lineage-jax/lineage_jax
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import SVG
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from experiments import language, llama, native_sparse
from experiments.study import Recipe, train
from experiments.study.heldout import heldout_means
from lineage_jax.data.text import TextData, load_text
from lineage_jax.kernels import (
    Branches,
    NSAConfig,
    compress,
    native_sparse_attention,
    select_blocks,
)
from lineage_jax.models.llama import Llama
from lineage_jax.models.native_sparse import NativeSparse
from scaling.plots import to_svg

# %% [markdown]
# ## 1. Three branches
#
# - *compressed*: every `stride` positions, one key stands for the `compressed_size` positions from
#   there on. A query reads all those that are wholly behind it: a rough view of everything.
# - *selected*: blocks of `block_size` positions, as they are. Which ones, the compressed branch
#   says: those whose compressed keys get most of its attention, from all heads of a group together.
#   The first block and the last ones are always among them.
# - *window*: the last positions.
#
# Each branch has keys and values of its own, and a gate of each head weighs what it brings. Sizes
# here are for a text of 128 tokens; the paper's are 32, 16, 64, 16 blocks and 512.

# %%
config = NSAConfig(
    compressed_size=8,
    stride=4,
    block_size=16,
    num_blocks=4,
    num_first=1,
    num_local=2,
    window=32,
)
LENGTH, WIDTH = 128, 16
at = np.arange(LENGTH)
rng = np.random.default_rng(0)
query, keys = (jnp.asarray(rng.normal(size=(1, LENGTH, n, WIDTH)), "float32") for n in (4, 1))
squeezed = compress(keys, lambda block: block.mean(-2), config)
blocks = np.asarray(select_blocks(query, squeezed, LENGTH, config=config))[0, :, 0]  # T N


def what_is_read(blocks):
    """For each branch, which positions each query reads: T S tables."""
    behind = at[:, None] >= at
    begins = config.stride * np.arange(config.num_compressed(LENGTH))
    ends = begins + config.compressed_size - 1
    compressed = np.zeros((LENGTH, LENGTH), bool)
    for begin, end in zip(begins, ends, strict=True):
        compressed[end:, begin : end + 1] = True
    chosen = (blocks[:, :, None] == at // config.block_size).any(1)
    return Branches(compressed, chosen & behind, behind & (at[:, None] - at < config.window))


def draw(tables, title):
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    colours = ("#c9a227", "#3a6ea5", "#5b8c5a")
    slots = (LENGTH - config.compressed_size) // config.stride + 1
    counts = (f"positions as {slots} keys", "positions", "positions")
    for axes, (name, table), colour, unit in zip(
        figure.subplots(1, 3), tables._asdict().items(), colours, counts, strict=True
    ):
        axes.imshow(table, cmap=ListedColormap(["#f4f4f4", colour]), interpolation="nearest")
        axes.set_title(f"{name}: {table.sum(1)[-1]} {unit}", fontsize=9)
        axes.set_xlabel("key", fontsize=8)
        axes.set_ylabel("query", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return SVG(to_svg(figure))


draw(
    what_is_read(blocks),
    "What each query reads, of keys that mean nothing yet (the last query counted)",
)

# %% [markdown]
# The compressed branch sees everything behind, 8 positions at a time. The selected one reads whole
# blocks: the first, the last two, and one more that scores best, which for keys drawn at random may
# be any. Neighbouring queries then choose differently, as the torn columns show. Keep that picture
# in mind for section 4, where the keys mean something.
#
# ## 2. With everything selected it is full attention
#
# Nothing about a branch is approximate: it is softmax over fewer keys. So with room for all blocks,
# and gates that let the selected branch alone through, nothing is left to tell it from the
# attention that every other milestone here uses.

# %%
values = jnp.asarray(rng.normal(size=keys.shape), "float32")
whole = dataclasses.replace(config, num_blocks=config.num_selectable(LENGTH))
gates = jnp.zeros((1, LENGTH, 4, 3)).at[..., 1].set(1.0)
out = native_sparse_attention(
    query,
    Branches(squeezed, keys, keys),
    Branches(squeezed, values, values),
    gates,
    config=whole,
)
full = jax.nn.dot_product_attention(query, keys, values, is_causal=True)
print(f"largest difference of {out.size:,} numbers: {jnp.abs(out - full).max():.1e}")

# %% [markdown]
# ## 3. Trained beside full attention
#
# LLaMA's decoder twice, in two layers, equal but for its attention: the same text (the prose and
# source code that every Python carries, as bytes), batches, schedule and seed.

# %%
UPDATES = 150
text = load_text(TextData(seq_len=LENGTH, batch_size=8, heldout_fraction=0.01))
optimizer = dataclasses.replace(native_sparse.tiny().optimizer, warmup_steps=30)
models = {
    "full attention": Llama(llama.tiny().model),
    "sparse attention": NativeSparse(
        dataclasses.replace(native_sparse.tiny().model, sparse=config)
    ),
}
trained = {}
for name, module in models.items():
    recipe = Recipe(
        module=module, init=language.init, loss_fn=language.loss_fn, optimizer=optimizer
    )
    trained[name] = train(
        recipe, text.train.stack, seed=0, peak=optimizer.learning_rate, updates=UPDATES
    )
    heldout = (text.heldout(step) for step in range(20))
    loss = heldout_means(module, language.loss_fn, trained[name], heldout)["loss"]
    print(f"{name:>16}: {loss / np.log(2):.3f} bits per byte")

read = what_is_read(blocks)
slots = np.maximum(0, (at - config.compressed_size + 1) // config.stride + 1).sum()
number = slots + read.selected.sum() + read.window.sum()
print(f"keys read: {number / (at + 1).sum():.0%} of those behind, at {LENGTH} tokens")

# %% [markdown]
# At 128 tokens nothing is saved: each branch has keys of its own, and together they are more than
# there are positions. What counts is how that grows with the length, which is section 5.
#
# ## 4. What a trained layer reads
#
# `weights` is how much each head of each layer reads of each position, all three branches together:
# each branch's own weights by its share of the gates.

# %%
sentence = (
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n"
)
ids = jnp.asarray([list(sentence.encode())])
module, params = models["sparse attention"], trained["sparse attention"]
look = jax.jit(functools.partial(module.apply, mutable=["intermediates"]))
_, found = look({"params": params}, ids)
weights = np.asarray(found["intermediates"]["blocks"]["attention"]["weights"][0])[:, 0]  # L H T S

figure = Figure(figsize=(8.4, 4.6), layout="constrained")
for layer, row in enumerate(figure.subplots(2, 4)):
    for head, axes in enumerate(row):
        axes.imshow(weights[layer, head] ** 0.5, cmap="Blues", interpolation="nearest")
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
figure.suptitle("Queries (down) and what they read (across), square roots", fontsize=10)
SVG(to_svg(figure))

# %% [markdown]
# ## 5. What it saves
#
# With the paper's sizes, a query at position t reads t / 16 compressed keys, 16 blocks of 64, and
# 512 neighbours. Decoding is bound by reading keys and values, so this is its time as well.

# %%
paper = NSAConfig()
lengths = 2 ** np.arange(10, 18)
reads = {
    "full": lengths,
    "compressed": lengths // paper.stride,
    "selected": np.minimum(lengths, paper.num_blocks * paper.block_size),
    "window": np.minimum(lengths, paper.window),
}
sparse = sum(reads[name] for name in Branches._fields)
figure = Figure(figsize=(5.6, 3.2), layout="constrained")
axes = figure.subplots()
for (name, keys_read), colour in zip(
    (*reads.items(), ("all three", sparse)),
    ("#888888", "#c9a227", "#3a6ea5", "#5b8c5a", "#222222"),
    strict=True,
):
    axes.loglog(
        lengths, keys_read, color=colour, lw=2.5 if name == "all three" else 1.2, label=name
    )
axes.set_xlabel("tokens behind the query")
axes.set_ylabel("keys it reads")
axes.legend(frameon=False, fontsize=8)
axes.spines[["top", "right"]].set_visible(False)
print(f"at 65,536 tokens: 1 of {65536 / sparse[list(lengths).index(65536)]:.1f} keys")
SVG(to_svg(figure))

# %% [markdown]
# The paper's table 4 has the same ratio: 11.6 times as fast to decode at 64k. The compressed branch
# still grows with the length, a sixteenth as fast.
#
# ## 6. Try it
#
# - Raise `num_blocks` to 8. Does the loss fall? What is read more?
# - `lineage diff llama native_sparse` in a terminal: what the child changed, and its cost.
# - `lineage train native_sparse --preset tiny`, then `lineage attention runs/native_sparse-tiny
#   --text "def f(x):"` draws every head.
# - Read `lineage_jax/kernels/native_sparse/reference.py`: the whole of it in a page.
