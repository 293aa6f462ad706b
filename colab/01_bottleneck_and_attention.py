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
# # From a bottleneck to attention, in three minutes
#
# Four papers, three years, one question: what may a decoder know of what it translates?
#
# | year | paper | what the decoder knows |
# |---|---|---|
# | 2014 | Sutskever et al., LSTM encoder-decoder | one vector |
# | 2014 | Bahdanau et al. | a weighted sum of the encoder's states, new for each word |
# | 2015 | Luong et al. | the same, the weights from plain inner products |
# | 2017 | Vaswani et al., Transformer | the same several times over, and no recurrence at all |
#
# You train a small one of each to translate English numbers into French, and see where each of them
# looks. It runs on a CPU. `lineage claim seq2seq` and its siblings measure the same with care: more
# seeds, tuned learning rates, intervals.

# %%
# In Colab, first:  !pip install -q git+https://github.com/lineage-jax/lineage_jax
import dataclasses

import jax
import numpy as np
from IPython.display import SVG
from matplotlib.figure import Figure

from experiments import bahdanau, luong, seq2seq, transformer, translation
from experiments.study import Recipe, train
from experiments.study.translation import OPTIMIZER, SPREAD, measure, number_pairs
from lineage_jax.data.pairs import load_pairs
from lineage_jax.models.bahdanau import Bahdanau
from lineage_jax.models.luong import Luong
from lineage_jax.models.seq2seq import Seq2Seq
from lineage_jax.models.transformer import StackConfig, Transformer
from scaling.plots import to_svg

# %% [markdown]
# ## 1. Sentences
#
# Numbers of three to nine digits, in words: as many pairs as one likes, and the length of a
# sentence is under control. The words of each language are its vocabulary.

# %%
pairs = load_pairs(number_pairs())
for source, target in pairs.heldout_pairs[:3]:
    print(f"{source}\n    {target}")
print(pairs.source_vocab_size, "English tokens,", pairs.vocab_size, "French ones")

# %% [markdown]
# ## 2. Four models
#
# All have one interface, `model(source, tokens, source_mask, mask) -> logits`, and so the same
# training. Sizes are alike: about 96 wide, one layer for the recurrent ones and two for the
# Transformer. Recurrent weights start 3.2 times as large as in the papers, whose networks are ten
# times as wide.

# %%
c = seq2seq.tiny().model
vector = Seq2Seq(
    dataclasses.replace(
        c, num_layers=1, hidden_dim=96, init_scale=SPREAD * c.init_scale, forget_bias=1.0
    )
)
c = bahdanau.tiny().model
additive = Bahdanau(
    dataclasses.replace(c, init_std=SPREAD * c.init_std, alignment_std=SPREAD * c.alignment_std)
)
c = luong.tiny().model
products = Luong(
    dataclasses.replace(
        c, num_layers=1, init_scale=SPREAD * c.init_scale, forget_bias=1.0, score="general"
    )
)
side = StackConfig(num_layers=2, num_heads=4, mlp_dim=256)
heads = Transformer(dataclasses.replace(transformer.tiny().model, encoder=side, decoder=side))

models = {"one vector": vector, "Bahdanau": additive, "Luong": products, "Transformer": heads}
peaks = {"one vector": 1e-2, "Bahdanau": 1e-2, "Luong": 1e-2, "Transformer": 3e-3}

# %% [markdown]
# ## 3. Train
#
# 300 updates of 64 pairs, the same pairs for all. `train` compiles fifty updates into one program:
# a `lax.scan` over the step that `lineage train` runs.

# %%
UPDATES = 300
params, results = {}, {}
for name, module in models.items():
    recipe = Recipe(
        module=module,
        init=translation.init,
        loss_fn=translation.loss_fn,
        optimizer=OPTIMIZER,
    )
    params[name] = train(recipe, pairs.train.stack, seed=0, peak=peaks[name], updates=UPDATES)
    results[name] = measure(module, params[name], pairs, forward=True)
    size = sum(leaf.size for leaf in jax.tree.leaves(params[name]))
    print(
        f"{name:>12}: {size:>7,} parameters, {results[name]['loss']:.3f} nats a word, "
        f"{results[name]['exact']:.0%} of held-out numbers exact"
    )

# %% [markdown]
# ## 4. Long sentences
#
# Everything that the first decoder will ever know of a number fits in one vector of 96 floats, nine
# digits or three. The others look back. This is figure 2 of Bahdanau et al., in miniature.

# %%
digits = np.arange(3, 10)
figure = Figure(figsize=(5.6, 3.4), layout="constrained")
axes = figure.subplots()
for name, found in results.items():
    axes.plot(digits, [found[f"exact_{n}"] for n in digits], marker="o", label=name)
axes.set(xlabel="digits of the number", ylabel="translated exactly", ylim=(-0.02, 1.02))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
SVG(to_svg(figure))

# %% [markdown]
# ## 5. Where it looks
#
# For each French word, how the decoder weighed the English ones. Nothing told it which word
# translates which. Bahdanau's weights are computed *before* the word is known, by a state that
# knows what was written so far. The Transformer's are those of one head: others do other work.

# %%
longest = max(range(64), key=lambda row: len(pairs.heldout_pairs[row][0]))
batch = {name: array[longest : longest + 1] for name, array in pairs.heldout(0).items()}


def words(tokenizer, ids):
    return [tokenizer.decode([i]) or "(end)" for i in ids]


english = words(pairs.source_tokenizer, batch["source"][batch["source_mask"]])
french = words(pairs.target_tokenizer, batch["targets"][batch["mask"]])


def looks(name):
    """The weights [T, S] of a model on that sentence; of the Transformer, head by head."""
    inputs = [batch[key] for key in ("source", "tokens", "source_mask", "mask")]
    variables = {"params": params[name]}
    _, sown = jax.jit(
        lambda *inputs: models[name].apply(variables, *inputs, mutable=["intermediates"])
    )(*inputs)
    if name == "Transformer":
        (found,) = sown["intermediates"]["decoder"]["blocks"]["cross_attention"]["weights"]
        found = found[-1, 0]  # H T S, of the last layer
        sharpest = found.max(-1).mean(-1).argmax()
        return np.asarray(found[sharpest])
    (found,) = sown["intermediates"]["alignment"]
    return np.asarray(found[0])


figure = Figure(figsize=(11, 4.6), layout="constrained")
shown = ("Bahdanau", "Luong", "Transformer")
for axes, name in zip(figure.subplots(1, 3), shown, strict=True):
    axes.imshow(looks(name)[: len(french), : len(english)], cmap="Blues", vmin=0, vmax=1)
    axes.set_title(name)
    axes.set_xticks(range(len(english)), english, rotation=90, fontsize=7)
    axes.set_yticks(range(len(french)), french, fontsize=7)
SVG(to_svg(figure))

# %% [markdown]
# ## 6. Try it
#
# - Read the source backwards (`number_pairs(reverse_source=True)`): the one vector gets better, as
#   section 3.3 of Sutskever et al. says. Does attention?
# - `score="location"` or `alignment="local_p"` in Luong's model: what if it may not see the words?
# - Write it as a run: `lineage train transformer --preset tiny`, then
#   `lineage attention runs/transformer-tiny --text "nine hundred and five"` for every head.
