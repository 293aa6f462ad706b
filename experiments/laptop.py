"""The laptop sweep: scaling laws of GPTs on the text that every Python installation carries.

`lineage sweep laptop` trains it in ten to fifteen minutes on two cores, fits the laws and writes
the report. Models of 6.6 to 793 thousand non-embedding parameters read bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from experiments import language
from lineage_jax.data.packing import Batches
from lineage_jax.data.text import TextData, TextDataset, load_text
from lineage_jax.models import gpt
from lineage_jax.train.optim import OptimizerConfig, adamw
from scaling import flops
from scaling.sweep import CHUNK, Size, Sweep

SEQ_LEN, BATCH_SIZE = 64, 8

# (layers, width): heads are 16 wide; each size has about twice the parameters of the one before.
# Each is trained on every budget from the first to the last named, three to a factor of ten.
# Budgets are shared, so that runs of equal compute can be compared (Hoffmann et al. 2022, section
# 3.2), and reach far enough to either side of the best size for most. None is shorter than 250
# steps: a run in its first transient obeys no power law.
SHAPES = {
    (2, 16): (2e10, 2e11),
    (2, 24): (2e10, 5e11),
    (2, 32): (5e10, 1e12),
    (2, 48): (1e11, 1e12),
    (3, 64): (2e11, 2e12),
    (4, 80): (5e11, 2e12),
    (4, 128): (1e12, 5e12),
}
FLOPS = tuple(10 ** (k / 3) for k in range(31, 39))


def laptop() -> Sweep:
    """Seven sizes over two decades of non-embedding parameters, three budgets or more each.

    Raises:
      OSError: if the Python installation does not carry its own text.
    """
    text = load_text(TextData(seq_len=SEQ_LEN, batch_size=BATCH_SIZE))
    optimizer = OptimizerConfig(schedule="wsd", warmup_steps=20)
    configs = {
        (layers, width): gpt.GPTConfig(
            num_layers=layers,
            embed_dim=width,
            num_heads=max(1, width // 16),
            head_dim=16,
            vocab_size=text.vocab_size,
            max_len=SEQ_LEN,
        )
        for layers, width in SHAPES
    }
    sizes = [
        size(
            config,
            optimizer,
            budgets=budgets(flops.gpt(config, SEQ_LEN).train(), *SHAPES[shape]),
            learning_rate=0.25 / config.embed_dim,  # rates fall about as 1 / width
        )
        for shape, config in configs.items()
    ]
    told = facts(text, optimizer, list(configs.values()), tuned_at="second", eval_batches=64)
    return text_sweep("laptop", text, sizes, optimizer, tune_budget=1, eval_batches=64, facts=told)


def text_sweep(
    name: str,
    text: TextDataset,
    sizes: Sequence[Size],
    optimizer: OptimizerConfig,
    *,
    tune_budget: int,
    eval_batches: int,
    facts: Mapping[str, str],
) -> Sweep:
    """A sweep of models that learn one text and are measured on its held-out documents."""
    train = text.train
    return Sweep(
        name=name,
        sizes=tuple(sizes),
        train=train,
        # Held-out rows in an order of their own, so that the first few come from all documents.
        heldout=Batches(
            text.heldout.stream,
            batch_size=train.batch_size,
            seq_len=train.seq_len,
            seed=1,
            shuffle=True,
        ),
        eval_batches=eval_batches,
        bytes_per_token=text.bytes_per_token,
        optimizer=optimizer,
        tune_budget=tune_budget,
        facts=facts,
    )


def size(
    config: gpt.GPTConfig,
    optimizer: OptimizerConfig,
    *,
    budgets: tuple[int, ...],
    learning_rate: float,
) -> Size:
    """One GPT of a sweep on rows of `max_len` tokens; `learning_rate` is where tuning starts."""
    width, seq_len = config.embed_dim, config.max_len
    # Nguyen and Salazar 2019, section 3.2
    config = dataclasses.replace(config, init_std=math.sqrt(2 / (5 * width)))
    model, count = gpt.GPT(config), gpt.num_params(config)
    return Size(
        name=f"{config.num_layers}x{width}",
        init=functools.partial(language.init, model),
        loss_fn=language.loss_fn(model, train=True),
        eval_loss_fn=language.loss_fn(model, train=False),
        tx=adamw(optimizer),
        params=count["total"],
        params_no_embed=count["non_embedding"],
        flops_per_token=flops.gpt(config, seq_len).train(),
        budgets=budgets,
        learning_rate=learning_rate,
        shape={"num_layers": config.num_layers, "embed_dim": width, "seq_len": seq_len},
    )


def budgets(flops_per_token: int, first: float, last: float) -> tuple[int, ...]:
    """The steps of each run of one size, in whole chunks; the ends are meant within a tenth."""
    chunk = flops_per_token * BATCH_SIZE * SEQ_LEN * CHUNK
    return tuple(round(c / chunk) * CHUNK for c in FLOPS if 0.9 * first < c < 1.1 * last)


def facts(
    text: TextDataset,
    optimizer: OptimizerConfig,
    configs: Sequence[gpt.GPTConfig],
    *,
    tuned_at: str,
    eval_batches: int,
) -> dict[str, str]:
    """What was held fixed: the checklist of Li et al. 2025 (arXiv 2502.18969)."""
    told, train = text.provenance(), text.train
    heads = sorted({c.head_dim or c.embed_dim // c.num_heads for c in configs})
    return {
        "data": f"{text.name}: the topics of pydoc_data and the standard library's modules, "
        f"{told['train']['tokens']:,} training tokens, digest {text.digest[:16]}",
        "tokenizer": "bytes, and one id for the end of a document",
        "held-out loss": f"{told['heldout']['documents']} documents kept from training, the same "
        f"{eval_batches * train.tokens_per_batch:,} tokens of them for every run",
        "architecture": "GPT-2: pre-norm decoder, learned positions, tied embeddings, heads of "
        + ", ".join(map(str, heads)),
        "shape of the sizes": ", ".join(f"{c.num_layers} x {c.embed_dim}" for c in configs)
        + " (layers x width)",
        "parameter count": "with embeddings for Chinchilla's law, without for Kaplan's",
        "FLOP count": "2 per weight and token in the blocks and the head, causal attention, "
        "forward and backward; norms and look-ups left out",
        "optimiser": f"AdamW, betas {optimizer.b1} and {optimizer.b2}, weight decay "
        f"{optimizer.weight_decay} on matrices, gradients clipped at {optimizer.max_grad_norm}",
        "learning rate": f"tuned per size in factors of two, at its {tuned_at} budget, until the "
        "best has a worse neighbour on either side",
        "schedule": f"warm-up, constant, and a linear cool-down to zero over the last "
        f"{optimizer.decay_fraction:.0%} of each budget, from one trunk per trial",
        "warm-up": f"{optimizer.warmup_steps} steps, whatever the budget",
        "batch size": f"{train.batch_size} x {train.seq_len} tokens for every size",
        "initialisation": "normal, variance 2 / (5 width), residual projections / sqrt(2 layers)",
        "precision": configs[0].dtype,
        "seeds": "one",
        "end points": "after each cool-down, on held-out text",
    }


SWEEPS = {"laptop": laptop}
