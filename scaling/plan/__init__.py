"""Plans a sweep before it is trained: an isoFLOP grid of real shapes, its time and cost, what next.

Each budget of FLOPs gets the neighbouring rungs of one ladder of shapes around its expected optimum
(Hoffmann et al. 2022, section 3.2), so that the minimum has sizes on both sides. The ladder is
the same for all budgets: a size serves several, and `scaling.sweep` trains it once, with a short
cool-down for each.

A plan is JSON, for `lineage sweep PLAN.json`:

    plan            1, the version of this schema
    seq_len, batch_size, warmup_steps, vocab_size, dtype, tokenizer, data_path
    hardware, chips, mfu, price      of a chip hour; null if not given
    sizes           num_layers, embed_dim, num_heads, learning_rate (where tuning starts);
                    params, params_no_embed, flops_per_token; runs:
      runs          budget and steps; tokens, flops (exact), six_nd, trained_flops, seconds, cost
    totals          runs, flops, trained_flops, tokens (of the longest run), seconds, cost
    assumptions     in words
    next            where --target was given: runs by what they would add to a fit

The values of the first lines and of `sizes` up to the first semicolon, `budget` and `steps` are
read; all others follow from them: one that is there and differs is an error.
"""

from scaling.plan.grid import PlanOptions, batch_rule, expected_optimum, make_plan, rate_rule
from scaling.plan.next_run import NextRun, next_runs, remaining_variance
from scaling.plan.plan import Plan, PlannedRun, PlannedSize, read_plan, trained_steps
from scaling.plan.shapes import Shape, depth, ladder
from scaling.plan.show import plan_file

__all__ = [
    "NextRun",
    "Plan",
    "PlanOptions",
    "PlannedRun",
    "PlannedSize",
    "Shape",
    "batch_rule",
    "depth",
    "expected_optimum",
    "ladder",
    "make_plan",
    "next_runs",
    "plan_file",
    "rate_rule",
    "read_plan",
    "remaining_variance",
    "trained_steps",
]
