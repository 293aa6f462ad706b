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
# # Read first, then learn the task, in three minutes
#
# In 2018 and 2019 four papers found the same thing four ways: a network that has read a lot of text
# needs few labels. They differ in what reading means.
#
# | year | paper | network | while it reads, it predicts |
# |---|---|---|---|
# | 2018 | Howard and Ruder, ULMFiT | LSTM | the next word |
# | 2018 | Radford et al., GPT | Transformer decoder | the next word |
# | 2018 | Devlin et al., BERT | Transformer encoder | words that were hidden, from both sides |
# | 2019 | Raffel et al., T5 | encoder and decoder | spans that were cut out, written as text |
#
# You train a small one of each on text without labels, and then teach it a task from eight
# examples. It runs on a CPU. `lineage claim gpt` and its siblings measure the papers' own claims
# with care, and the README says which of them came out.

# %%
# In Colab, first:  !pip install -q git+https://github.com/lineage-jax/lineage_jax
import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from IPython.display import SVG
from matplotlib.figure import Figure
from num2words import num2words

from experiments import bert, gpt, language, masked, t5, translation, ulmfit, ulmfit_tuning
from experiments.study import Recipe, train
from experiments.study.training import stack, train_state
from lineage_jax.data.labelled_batches import LabelledBatches, Marks, end_of_text_marks
from lineage_jax.data.masking import MaskedBatches, special_tokens_after
from lineage_jax.data.packing import Batches
from lineage_jax.data.pair_batches import PairBatches
from lineage_jax.data.sources import Corpus, Document
from lineage_jax.data.span_corruption import DenoisingBatches
from lineage_jax.data.tokens import join, tokenize
from lineage_jax.data.train_tokenizers import train_cached
from lineage_jax.models.bert import Bert, MaskedLM, SequenceClassifier
from lineage_jax.models.gpt import GPT, Classifier
from lineage_jax.models.t5 import T5
from lineage_jax.models.ulmfit import Classifier as ULMFiTClassifier
from lineage_jax.models.ulmfit import ClassifierConfig, ULMFiT
from lineage_jax.train.optim import OptimizerConfig
from scaling.plots import to_svg

# %% [markdown]
# ## 1. A world to read about
#
# Numbers in words, in eight languages. A document is four numbers in one language; nobody says
# which. The task is to name the language of a single number. Each word is one token, so that a
# model which has not read knows nothing of a word that no example had: *siete* and *seis* are as
# far apart as *siete* and *sept*.

# %%
LANGUAGES = {
    "en": "English",
    "fr": "French",
    "es": "Spanish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "pl": "Polish",
    "cs": "Czech",
    "ru": "Russian",
}
rng = np.random.default_rng(0)


def number(code):
    return num2words(int(rng.integers(1_000, 1_000_000)), lang=code)


unlabelled = [" ".join(number(code) for _ in range(4)) for code in LANGUAGES for _ in range(400)]
unlabelled = [unlabelled[i] for i in rng.permutation(len(unlabelled))]
task = {name: [(number(code), name) for _ in range(48)] for code, name in LANGUAGES.items()}
test = [example for of_one in task.values() for example in of_one[8:]]

documents = [Document(f"numbers:{i}", text) for i, text in enumerate(unlabelled)]
with tempfile.TemporaryDirectory() as folder:
    tokenizer = train_cached("words", [Corpus("numbers", tuple(documents))], 2000, folder)
text = tokenize(documents, tokenizer)


def examples(count):
    """As many of each language."""
    return [example for of_one in task.values() for example in of_one[:count]]


def ids(example):
    return tokenizer.encode(example[0])


known = {i for example in examples(1) for i in ids(example)}
share = np.mean([i in known for example in test for i in ids(example)])
print(unlabelled[0])
print(f"{tokenizer.vocab_size} words; eight examples have {share:.0%} of those of the test")

# %% [markdown]
# ## 2. Four ways to read
#
# The same text, four questions. Look at what goes in, and at what each model is asked.

# %%
WORDS, END, LENGTH, ROWS = tokenizer.vocab_size, tokenizer.end_of_text, 40, 32
special = special_tokens_after(WORDS)  # [CLS], [SEP], [MASK] and padding
T5_IDS = WORDS + len(LANGUAGES) + 32  # the languages' names, and sentinels at the top

packed = Batches(text, batch_size=ROWS, seq_len=LENGTH)
hidden = MaskedBatches(text, special, batch_size=ROWS, seq_len=LENGTH)
spans = DenoisingBatches(
    text, batch_size=ROWS, text_len=LENGTH, vocab_size=T5_IDS, start=END, end=END
)


def shown(row, mask=True):
    """Ids as words; what is no word in brackets."""
    names = {END: "(end)", special.cls: "[CLS]", special.sep: "[SEP]", special.mask: "[MASK]"}
    said = [names.get(i) or (tokenizer.decode([i]) if i < WORDS else f"<{T5_IDS - 1 - i}>")
            for i in np.asarray(row).tolist()]  # fmt: skip
    kept = np.broadcast_to(mask, len(said))
    return " ".join(word if keep else "·" for word, keep in zip(said, kept, strict=True))


row = {name: array[0] for name, array in packed(0).items()}
print("GPT, ULMFiT  in: ", shown(row["tokens"][:9]))
print("             out:", shown(row["targets"][:9]))
fullest = hidden(0)["mask"].sum(-1).argmax()
row = {name: array[fullest] for name, array in hidden(0).items()}
print("BERT         in: ", shown(row["tokens"][:9]))
print("             out:", shown(row["targets"][:9], row["target_mask"][:9]))
row = {name: array[0] for name, array in spans(0).items()}
print("T5           in: ", shown(row["source"][:16]))
print("             out:", shown(row["targets"][:9]))

# %% [markdown]
# ## 3. Read
#
# 300 updates each. The losses cannot be compared, as the questions are not the same: BERT and T5
# are asked for a sixth of the words, and so learn less from each row; and nobody can know which
# number comes next.

# %%
UPDATES = 300
SIZES = dict(num_layers=2, embed_dim=64)
READING = OptimizerConfig(warmup_steps=30, weight_decay=0.0)
rows = dict(max_len=LENGTH)

lstm = dataclasses.replace(
    ulmfit.tiny().model, embed_dim=64, hidden_dim=96, vocab_size=WORDS, **rows
)
decoder = dataclasses.replace(gpt.tiny().model, **SIZES, vocab_size=WORDS, **rows)
with_marks = gpt.classifier(decoder)  # three ids more: around a text that is to be classified
encoder = dataclasses.replace(
    bert.tiny().model, **SIZES, vocab_size=special.vocab_size, num_labels=len(LANGUAGES), **rows
)
both = dataclasses.replace(
    t5.tiny().model, embed_dim=64, head_dim=16, mlp_dim=128, vocab_size=T5_IDS
)

reading = {
    "ULMFiT": (ULMFiT(lstm), language.init, ulmfit.loss_fn, packed.stack),
    "GPT": (
        GPT(dataclasses.replace(decoder, vocab_size=with_marks.vocab_size)),
        language.init,
        language.loss_fn,
        packed.stack,
    ),
    "BERT": (MaskedLM(Bert(encoder)), masked.init, masked.loss_fn, stack(hidden)),
    "T5": (T5(both), translation.init, translation.loss_fn, stack(spans)),
}
read = {}
for name, (module, init, loss_fn, batches) in reading.items():
    recipe = Recipe(module=module, init=init, loss_fn=loss_fn, optimizer=READING)
    read[name] = train(recipe, batches, seed=0, peak=5e-3, updates=UPDATES)
    batch = jax.tree.map(lambda x: x[0], batches(10_000, 1))
    loss, _ = jax.jit(loss_fn(module, train=False))(read[name], {}, batch, jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(read[name]))
    print(f"{name:>7}: {size:>7,} parameters, {loss:.2f} nats a predicted word")

# %% [markdown]
# ## 4. Learn the task
#
# Each paper puts the label somewhere else. ULMFiT pools all outputs of the LSTM. GPT reads it off
# the last token, BERT off the first, which saw both sides. T5 writes it: a label is a text like any
# other, and nothing is added to the network.
#
# The only difference between the arms is where they begin: with what was read, or anew.

# %%
TUNING = OptimizerConfig(warmup_steps=10, weight_decay=0.0)
NAMES = list(LANGUAGES.values())


def labelled(some, *, marks, **how):
    """Batches of examples, between the marks that the model expects."""
    labels = np.array([NAMES.index(name) for _, name in some])
    return LabelledBatches(
        [(ids(example),) for example in some], labels, marks, seq_len=LENGTH, **how
    )


def written(some, **how):
    """The same as text to text: a number, and the name of its language."""
    numbers = tokenize([Document("number", example[0]) for example in some], tokenizer)
    names = [np.array([WORDS + NAMES.index(name), END]) for _, name in some]
    return PairBatches(
        numbers, join(names, T5_IDS, None), start=END, source_len=LENGTH, target_len=2, **how
    )


def classifier_init(module, key):
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


pooled = ULMFiTClassifier(ClassifierConfig(**vars(lstm), num_labels=len(NAMES)))
extracted, first = Classifier(with_marks), SequenceClassifier(Bert(encoder))
begun = jax.jit(functools.partial(ulmfit_tuning.init, pooled))(jax.random.key(0))
counted = nn.meta.unbox(begun[1])  # by batch norm
at_ends = Marks(start=special.cls, between=special.sep, end=special.sep, padding=special.padding)


def score_ulmfit(params, extra, batch):
    return pooled.apply({"params": params, **extra}, batch["tokens"], batch["mask"])


def score_gpt(params, extra, batch):
    return extracted.apply({"params": params}, batch["tokens"], batch["mask"])[0]


def score_bert(params, extra, batch):
    return first.apply({"params": params}, batch["tokens"], batch["types"], mask=batch["mask"])


def score_t5(params, extra, batch):
    inputs = [batch[name] for name in ("source", "tokens", "source_mask", "mask")]
    return T5(both).apply({"params": params}, *inputs)[:, 0]  # over all that it might write


# Of each: the classifier, how it begins, its objective, its batches and its scores.
tuning = {
    "ULMFiT": (
        pooled,
        classifier_init,
        ulmfit_tuning.loss_fn,
        functools.partial(labelled, marks=end_of_text_marks(tokenizer)),
        score_ulmfit,
    ),
    "GPT": (
        extracted,
        classifier_init,
        gpt.classification_loss_fn,
        functools.partial(labelled, marks=gpt.marks_after(WORDS)),
        score_gpt,
    ),
    "BERT": (
        first,
        classifier_init,
        bert.classification_loss_fn,
        functools.partial(labelled, marks=at_ends),
        score_bert,
    ),
    "T5": (T5(both), translation.init, translation.loss_fn, written, score_t5),
}
begins = {
    "ULMFiT": {"encoder": read["ULMFiT"]["encoder"]},
    "GPT": {"gpt": read["GPT"]},
    "BERT": {"encoder": read["BERT"]["encoder"]},
    "T5": read["T5"],
}


def accuracy(score, state, batches):
    """The share of test examples whose label scores highest."""
    hits = []
    for step in range(batches.num_batches):
        batch = batches(step)
        best = np.asarray(score(state.params, state.extra, batch)).argmax(-1)
        true = batch["label"] if "label" in batch else batch["targets"][:, 0]
        hits += (best == true)[batch["mask"].any(-1)].tolist()
    return np.mean(hits)


TUNING_UPDATES = 100
COUNTS = (1, 3, 8)
found = {}
for name, (module, init, loss_fn, make, score) in tuning.items():
    recipe = Recipe(module=module, init=init, loss_fn=loss_fn, optimizer=TUNING)
    score, tested = jax.jit(score), make(test, batch_size=64, shuffle=False)
    fresh = nn.meta.unbox(jax.jit(lambda key, r=recipe: r.init(r.module, key))(jax.random.key(1)))
    for arm, begin in (("anew", fresh), ("after reading", {**fresh, **begins[name]})):
        for count in COUNTS:
            state = train_state(
                recipe,
                stack(make(examples(count), batch_size=8)),
                seed=0,
                peak=1e-3,
                updates=TUNING_UPDATES,
                params=begin,
                extra=counted if name == "ULMFiT" else None,
            )
            found[name, arm, count] = accuracy(score, state, tested)
    told = (f"{arm} {found[name, arm, 1]:.0%}" for arm in ("anew", "after reading"))
    print(f"{name:>7}, eight labels in all: {', '.join(told)}")

# %% [markdown]
# ## 5. Labels saved
#
# Figure 3 of the ULMFiT paper in miniature: how many labels of each language it takes, begun anew
# and after reading. Each dot is one run, so that the lines wander; the grey one is a guess.

# %%
figure = Figure(figsize=(9.6, 2.8), layout="constrained")
for axes, name in zip(figure.subplots(1, 4, sharey=True), tuning, strict=True):
    for arm, colour in (("anew", "#59636e"), ("after reading", "#c2361c")):
        axes.plot(COUNTS, [found[name, arm, n] for n in COUNTS], "o-", color=colour, label=arm)
    axes.axhline(1 / len(NAMES), color="#d5dae0", lw=1)
    axes.set(title=name, ylim=(0, 1.03), xlabel="labels of each language")
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
    axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="lower right", fontsize=8)
figure.axes[0].set_ylabel("languages told right")
SVG(to_svg(figure))

# %% [markdown]
# ## 6. Try it
#
# - Let a document be one number in place of four (`range(4)`). T5, whose texts run over the borders
#   of documents, then reads a jumble of languages. What is left of its lead?
# - ULMFiT's own fine-tuning has a rate for each layer, and thaws them one by one:
#   `lineage train ulmfit --preset classify --start-from runs/ulmfit-tiny`.
# - Freeze what was read, and learn the head alone. Which of the four suffers least?
# - The papers' sizes are presets: `lineage train bert --preset base --help`.
