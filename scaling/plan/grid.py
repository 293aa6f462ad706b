"""The isoFLOP grid that some options ask for, and the rules behind it."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lineage_jax.data.text import BPE_VOCAB_SIZE
from lineage_jax.data.tokenizers import ByteTokenizer
from lineage_jax.train.metrics import PEAK_FLOPS
from scaling.fit import Fit
from scaling.isoflop import SAME
from scaling.isoflop import SIZES as LEAST_SIZES
from scaling.plan.plan import HARDWARE, RATES, Plan, PlannedSize
from scaling.plan.shapes import ladder
from scaling.study import quantity
from scaling.sweep import CHUNK

SHORTEST = 250  # steps: a run in its first transient obeys no power law
WARMUP = 20  # of them to the shortest run: long ones bend the exponents (Porian et al. 2024)
APART = 1 + 4 * SAME  # one budget over the next, so that `fit_isoflop` tells them apart


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to plan."""

    flops_min: float
    """FLOPs of each run of the smallest budget, counted by scaling/flops.py."""
    flops_max: float
    """Of the largest."""
    budgets: int = 5
    """Budgets, evenly spaced in the logarithm, the last --flops-max (Hoffmann et al. 2022, section
    3.2, have nine)."""
    sizes: int = 7
    """Sizes of each budget, about their optimum; lineage fit --law isoflop needs four."""
    fit: str | None = None
    """A fit that says where the best size of each budget is expected (the JSON of lineage fit or
    lineage sweep). Without it, --tokens-per-param does."""
    tokens_per_param: float = 20.0
    """Tokens for each parameter of the best size, C = 6 N D (Hoffmann et al. 2022, table 3)."""
    seq_len: int = 256
    """Tokens in a row (nanoGPT, config/train_shakespeare_char.py)."""
    batch_tokens: int | None = None
    """Tokens in a step, the same for all runs; if not given, by DeepSeek-AI's rule at the smallest
    budget, or fewer, such that every run has 250 steps."""
    data_path: str | None = None
    """The text, as --data.path of lineage train. Without it, Python's own."""
    tokenizer: str = "bytes"
    """As --data.tokenizer: "bytes", "bpe", or the path of a tokenizer.json."""
    vocab_size: int | None = None
    """Of the models; needed for a tokenizer.json and for token files."""
    hardware: str | None = None
    """h200, h100, a100, v4, v5e, v5p or v6e: says how long it takes, in bfloat16. Without it the
    models compute in float32."""
    chips: int = 1
    """How many, all at work all the time."""
    mfu: float = 0.4
    """The part of the peak that training reaches; 0.38 to 0.43 at 405B (Llama Team 2024, arXiv
    2407.21783, table 4). Small models reach less."""
    price: float | None = None
    """Of one chip hour; the cost is in the same currency."""
    target: float | None = None
    """With --fit: which next runs would narrow its prediction at the optimum of so many FLOPs."""
    target_params: float | None = None
    """With --target-tokens, instead of --target: the size that is to be predicted."""
    target_tokens: float | None = None
    """Its tokens."""
    json: str = "plan.json"
    """Where to write the plan."""

    def __post_init__(self):
        if not 0 < self.flops_min < self.flops_max < math.inf:
            raise ValueError(
                f"wanted 0 < --flops-min < --flops-max, got {self.flops_min:g} and "
                f"{self.flops_max:g}"
            )
        if self.budgets < 1:
            raise ValueError(f"--budgets: wanted 1 or more, got {self.budgets}")
        most = 1 + int(math.log(self.flops_max / self.flops_min) / math.log(APART))
        if self.budgets > most:
            raise ValueError(
                f"--budgets: wanted {most} or fewer, each {APART - 1:.0%} above the one before, "
                f"got {self.budgets}; or widen --flops-min to --flops-max"
            )
        if self.sizes < LEAST_SIZES:
            raise ValueError(
                f"--sizes: wanted {LEAST_SIZES} or more, to find a minimum, got {self.sizes}"
            )
        if not 0 < self.tokens_per_param < math.inf:
            raise ValueError(
                f"--tokens-per-param: wanted a positive number, got {self.tokens_per_param}"
            )
        if self.seq_len < 1:
            raise ValueError(f"--seq-len: wanted 1 or more, got {self.seq_len}")
        if self.batch_tokens is not None and (
            self.batch_tokens < 1 or self.batch_tokens % self.seq_len
        ):
            raise ValueError(
                f"--batch-tokens: wanted a multiple of --seq-len {self.seq_len}, got "
                f"{self.batch_tokens}"
            )
        if (self.target_params is None) != (self.target_tokens is None) or (
            self.target is not None and self.target_params is not None
        ):
            raise ValueError("wanted --target, or --target-params with --target-tokens")
        for name in ("target", "target_params", "target_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"--{name.replace('_', '-')}: wanted a positive number, got {value}"
                )
        if self.fit is None and (self.target or self.target_params):
            raise ValueError("a target needs the fit that predicts it: wanted --fit FIT.json")

    def vocabulary(self) -> int:
        """Ids that the models have room for."""
        known = {"bytes": ByteTokenizer().vocab_size, "bpe": BPE_VOCAB_SIZE}
        vocab_size = self.vocab_size or known.get(self.tokenizer)
        if vocab_size is None:
            raise ValueError(f"--tokenizer {self.tokenizer}: wanted its --vocab-size too")
        return vocab_size


def make_plan(options: PlanOptions, fitted: Fit | None = None) -> Plan:
    """The isoFLOP grid that the options ask for; `fitted` says where the optima are expected.

    Raises:
      ValueError: the ladder has no sizes on both sides of an optimum, or a run is too short.
    """
    vocab_size, seq_len = options.vocabulary(), options.seq_len
    budgets = np.geomspace(options.flops_max, options.flops_min, options.budgets)[::-1].tolist()
    optima = [expected_optimum(c, options.tokens_per_param, fitted) for c in budgets]
    rungs = ladder()
    counts = [shape.params(vocab_size, seq_len) for shape in rungs]
    chosen = [neighbours(counts, n, options.sizes, c) for c, n in zip(budgets, optima, strict=True)]
    used = sorted({rung for rows in chosen for rung in rows})
    each = {rung: rungs[rung].flops_per_token(vocab_size, seq_len) for rung in used}
    shortest, at = min((c / each[r], r) for c, rows in zip(budgets, chosen, strict=True)
                       for r in rows)  # fmt: skip
    batch_tokens = options.batch_tokens or batch_rule(budgets[0], seq_len, shortest)
    if shortest / batch_tokens < SHORTEST:
        raise ValueError(
            f"the shortest run, {rungs[at].name} on {quantity(shortest)} tokens, has "
            f"{shortest / batch_tokens:.0f} steps of {batch_tokens} tokens, {SHORTEST} are wanted: "
            "raise --flops-min, or lower --batch-tokens or --seq-len"
        )
    chunk = batch_tokens * CHUNK
    sizes = []
    for rung in used:
        mine = [c for c, rows in zip(budgets, chosen, strict=True) if rung in rows]
        steps = tuple(round(c / each[rung] / chunk) * CHUNK for c in mine)
        sizes.append(
            PlannedSize(
                shape=rungs[rung],
                learning_rate=rate_rule(mine[0], batch_tokens),
                budgets=tuple(mine),
                steps=steps,
            )
        )
    plan = Plan(
        sizes=tuple(sizes),
        seq_len=seq_len,
        batch_size=batch_tokens // seq_len,
        warmup_steps=max(1, min(size.steps[0] for size in sizes) // WARMUP),
        vocab_size=vocab_size,
        dtype="float32" if options.hardware is None else "bfloat16",
        tokenizer=options.tokenizer,
        data_path=options.data_path,
        hardware=options.hardware,
        chips=options.chips,
        mfu=options.mfu,
        price=options.price,
    )
    return _with_assumptions(plan, options, fitted)


def expected_optimum(budget: float, tokens_per_param: float, fitted: Fit | None) -> float:
    """N*(C), parameters with embeddings: a fit's, or where C = 6 N D and D = ratio x N."""
    if fitted is not None:
        return float(fitted.optimal(budget).params)
    return math.sqrt(budget / (6 * tokens_per_param))


def neighbours(counts: Sequence[int], optimum: float, number: int, budget: float) -> range:
    """So many rungs of the ladder, as many below the optimum as above; the nearest is the middle.

    Raises:
      ValueError: the ladder ends too close to the optimum.
    """
    above = bisect.bisect(counts, optimum)
    if number % 2 and 0 < above < len(counts):
        above += counts[above] * counts[above - 1] < optimum**2  # the upper neighbour is nearer
    first = above - (number + 1) // 2 if number % 2 else above - number // 2
    if first < 0 or first + number > len(counts):
        end, change = ("smallest", "raise --flops-min") if first < 0 else (
            "largest", "lower --flops-max")  # fmt: skip
        raise ValueError(
            f"{number} sizes around {quantity(optimum)} parameters, the expected optimum of "
            f"{budget:.2g} FLOPs, go past the {end} shape there is, "
            f"{quantity(counts[0 if first < 0 else -1])}: {change}, or ask for fewer --sizes"
        )
    return range(first, first + number)


def rate_rule(budget: float, batch_tokens: int) -> float:
    """Where the tuning of a learning rate starts: 0.3118 C^-0.1250 sqrt(B / (0.2920 C^0.3271)).

    DeepSeek-AI 2024 (arXiv 2401.02954), equation 1, is for the batch of that equation; at another
    the best rate of Adam goes as its root (Malladi et al. 2022, arXiv 2205.10287).
    """
    return 0.3118 * budget**-0.1250 * math.sqrt(batch_tokens / (0.2920 * budget**0.3271))


def batch_rule(budget: float, seq_len: int, shortest: float) -> int:
    """Tokens in a step: B = 0.2920 C^0.3271 (DeepSeek-AI 2024, equation 1), in whole rows.

    A power of two of rows, which devices can share, and no more than leave `SHORTEST` steps to the
    shortest run. At the smallest budget: at the others a smaller batch than the rule's takes more
    steps, where a larger one would spend tokens.
    """
    rows = round(math.log2(max(1.0, 0.2920 * budget**0.3271 / seq_len)))
    most = math.floor(math.log2(max(1.0, shortest / SHORTEST / seq_len)))
    return 2 ** min(rows, most) * seq_len


def _with_assumptions(plan: Plan, options: PlanOptions, fitted: Fit | None) -> Plan:
    """The plan, with what it rests on in words."""
    totals = plan.totals()
    rates = sorted(size.learning_rate for size in plan.sizes)
    where = (
        f"by {fitted.law.name} of {options.fit}, FLOPs counted as {fitted.flops_convention}"
        if fitted
        else f"where C = 6 N D and D = {options.tokens_per_param:g} N (Hoffmann et al. 2022)"
    )
    batch = (
        "as asked for"
        if options.batch_tokens
        else f"B = 0.2920 C^0.3271 at the smallest budget, in a power of two of rows that leaves "
        f"{SHORTEST} steps or more to every run (same source)"
    )
    python_text = "Python's own text, about ten million bytes"
    said = [
        f"Sizes: {options.sizes} of the ladder around the optimum of each budget, {where}.",
        "Params: with embeddings. FLOPs: 2 per weight and token in the blocks and the head, causal "
        "attention, forward and backward; 6ND beside it is not what budgets are counted in.",
        "Learning rate: tuning starts at 0.3118 C^-0.1250 of each size's first budget (DeepSeek-AI "
        "2024, arXiv 2401.02954, equation 1) times the root of the batch over that rule's (Malladi "
        f"et al. 2022, arXiv 2205.10287), {rates[0]:.2g} to {rates[-1]:.2g}; the sweep moves it in "
        "factors of two there until both neighbours are worse.",
        f"Batch: {plan.batch_size} x {plan.seq_len} tokens for all runs, as a sweep has one: "
        f"{batch}.",
        f"Text: {plan.data_path or python_text}; the longest run reads "
        f"{quantity(totals['tokens'])} tokens.",
        f"Warm-up: {plan.warmup_steps} steps for all runs, a twentieth of the shortest.",
        f"Trained: each size once at a constant rate, a cool-down for each budget, and its first "
        f"run at {RATES} rates: {totals['trained_flops']:.3g} FLOPs; the runs by themselves, at "
        f"one rate each, are {totals['flops']:.3g}. More rates, evaluation and compiling are not "
        "counted.",
    ]
    if plan.hardware:
        peak, source = HARDWARE[plan.hardware]
        said.append(
            f"Time: {PEAK_FLOPS[peak] / 1e12:g} TFLOP/s in bfloat16 ({source}) x {plan.mfu:g} MFU "
            f"(assumed; small models reach less) x {plan.chips} chip{'s' * (plan.chips > 1)}."
        )
    if fitted:
        said += [f"Caution: {text}." for text in fitted.cautions(options.flops_max)]
    return replace(plan, assumptions=tuple(said))
