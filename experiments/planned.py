"""Trains a plan: `lineage plan-sweep ...` writes it, `lineage sweep PLAN.json` reads it."""

import pathlib

from experiments.laptop import facts, size, text_sweep
from lineage_jax.data.text import TextData, load_text
from scaling.plan import read_plan
from scaling.sweep import Sweep

EVAL_BATCHES = 64  # at the most, as in the laptop sweep; fewer if the held-out text has fewer


def planned(path: str) -> Sweep:
    """The sweep of a plan file, on the text that it names.

    Raises:
      ValueError: the file is no plan, or the text does not fit it.
      OSError: the file or the text cannot be read.
    """
    plan = read_plan(path)
    data = TextData(
        path=plan.data_path,
        tokenizer=plan.tokenizer,
        vocab_size=plan.vocab_size,
        seq_len=plan.seq_len,
        batch_size=plan.batch_size,
    )
    text = load_text(data)
    optimizer = plan.optimizer
    configs = [s.shape.config(plan.vocab_size, plan.seq_len, plan.dtype) for s in plan.sizes]
    eval_batches = min(EVAL_BATCHES, text.heldout.num_batches)
    told = facts(text, optimizer, configs, tuned_at="first", eval_batches=eval_batches)
    if plan.data_path is not None:
        told["data"] = (
            f"{text.name}: {text.num_train_tokens:,} training tokens, digest " + (text.digest[:16])
        )
    if plan.tokenizer != "bytes":
        told["tokenizer"] = f"{plan.tokenizer}, {plan.vocab_size:,} tokens"
    sweep = text_sweep(
        pathlib.Path(path).name,
        text,
        [
            size(config, optimizer, budgets=one.steps, learning_rate=one.learning_rate)
            for config, one in zip(configs, plan.sizes, strict=True)
        ],
        optimizer,
        tune_budget=0,
        eval_batches=eval_batches,
        facts=told | {"plan": "; ".join(plan.assumptions)},
    )
    return sweep


def repetition(sweep: Sweep) -> str | None:
    """One line if the longest run reads its text more than once, and how often."""
    steps = max(size.budgets[-1] for size in sweep.sizes)
    epochs = sweep.train.epoch(steps)
    if epochs <= 1:
        return None
    return (
        f"the longest run reads {steps * sweep.train.tokens_per_batch:,} tokens, {epochs:.1f} times"
        f" the {sweep.train.stream.num_tokens:,} that there are: its loss is that of repeated text "
        "(Muennighoff et al. 2023); name more with `lineage plan-sweep --data-path`"
    )
