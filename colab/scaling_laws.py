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
# # Scaling laws, from nothing, in three minutes
#
# How good will a language model be if it is ten times as large? Kaplan et al. (2020) and Hoffmann
# et al. (2022, "Chinchilla") found that the loss follows power laws in the number of parameters $N$
# and of training tokens $D$:
#
# $$L(N, D) = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta}$$
#
# Here you train a few small GPTs, fit that law to all but the largest, and predict the largest
# before you look at it. It runs on a CPU. The full version is one command, `lineage sweep laptop`.

# %%
# In Colab, first:  !pip install -q git+https://github.com/lineage-jax/lineage_jax
import dataclasses
import tempfile

from experiments.laptop import laptop
from lineage_jax.sharding import MeshConfig, make_mesh
from lineage_jax.train.progress import Progress
from scaling.fit import fit
from scaling.plots import figures, to_svg
from scaling.runs import read_runs
from scaling.study import study
from scaling.sweep import CHUNK, run, runs_table

# %% [markdown]
# ## 1. What is trained
#
# The laptop sweep, cut down: five sizes, and three budgets each. The text is the prose and source
# code that every Python installation carries, read as bytes.

# %%
full = laptop()
BUDGETS = 4, 8, 16
sizes = tuple(
    dataclasses.replace(size, budgets=tuple(CHUNK * n for n in BUDGETS)) for size in full.sizes[:5]
)
sweep = dataclasses.replace(full, name="notebook", sizes=sizes, eval_batches=8)
for size in sweep.sizes:
    print(f"{size.name:>6}: {size.params_no_embed:>8,} parameters without embeddings")

# %% [markdown]
# ## 2. Train
#
# Each size is trained once at a constant learning rate; each budget is a short cool-down from that
# run. The learning rate is tuned for each size, because a rate that is wrong for some sizes bends
# the law (Porian et al. 2024). Interrupt it if you like: run again and it goes on where it was.

# %%
folder = tempfile.mkdtemp()
mesh = make_mesh(MeshConfig())
with Progress() as progress:
    run(sweep, folder, mesh, progress)
table, curves, _ = runs_table(sweep, folder)
runs = read_runs(table)
print(f"{len(runs)} runs; losses from {runs['loss'].min():.3f} to {runs['loss'].max():.3f} nats")

# %% [markdown]
# ## 3. Fit the small, predict the large
#
# The largest model is set aside, with all its budgets. The law is fitted to the rest (Huber loss on
# log loss, Hoffmann et al. 2022, section 3.3) and only then is the measured loss looked at.

# %%
is_largest = runs["params"] == runs["params"].max()
fitted = fit(runs.take(~is_largest), law="chinchilla", bootstrap=100, seed=0)
for name, value in fitted.parameters.items():
    low, high = fitted.intervals[name]
    print(f"{name:>6} = {value:9.4g}   95 % interval {low:9.4g} to {high:9.4g}")

held = runs.take(is_largest)
predicted = fitted.predict(params=held["params"], tokens=held["tokens"], interval=0.95, noise=True)
for i in range(len(held)):
    print(
        f"{int(held['tokens'][i]):>8,} tokens: predicted {predicted.loss[i]:.3f} "
        f"({predicted.low[i]:.3f} to {predicted.high[i]:.3f}), measured {held['loss'][i]:.3f}"
    )

# %% [markdown]
# Look at the certificate before you believe a fit: an optimiser that says "converged" proves
# nothing. `starts_at_optimum` says how many starting points agree; `identified` whether the data
# determine each parameter at all. A sweep this small rarely determines $E$.

# %%
for name, value in fitted.certificate.items():
    print(f"{name:>18}: {value}")

# %% [markdown]
# ## 4. The whole analysis
#
# `study` does all of this at once, with Kaplan's laws and Chinchilla's other two approaches, as
# `lineage sweep` and `lineage fit` do.

# %%
done = study(runs, bootstrap=100)
print("\n".join(done.lines()))

# %%
from IPython.display import SVG

SVG(to_svg(figures(done)["forecast"][0]))

# %% [markdown]
# ## 5. Try it
#
# - Take the learning rate away from its optimum (`learning_rate` of a size) and see the law bend.
# - Count $N$ with embeddings or without (`fit(..., params="params_no_embed")`): at these sizes the
#   exponent moves. Which one is "right"?
# - Fit your own runs: `lineage fit RUNS.csv --report report.html`.
