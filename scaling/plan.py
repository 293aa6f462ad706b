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

import bisect
import difflib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import numpy as np
from etils import epath
from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lineage_jax.data.text import BPE_VOCAB_SIZE
from lineage_jax.data.tokenizers import ByteTokenizer
from lineage_jax.models.gpt import GPTConfig
from lineage_jax.train.metrics import PEAK_FLOPS, write_json
from lineage_jax.train.optim import OptimizerConfig, decay_start
from lineage_jax.typing import Precision
from scaling import flops
from scaling.fit import Fit, read_fit
from scaling.isoflop import SAME
from scaling.isoflop import SIZES as LEAST_SIZES
from scaling.laws import evaluate
from scaling.study import quantity as _quantity
from scaling.sweep import CHUNK

VERSION = 1
HARDWARE = {  # name -> (its row of PEAK_FLOPS, who says so)
    "h200": ("NVIDIA H200", "NVIDIA H200 data sheet, SXM, half of the rate with sparsity"),
    "h100": ("NVIDIA H100", "NVIDIA H100 data sheet, SXM, half of the rate with sparsity"),
    "a100": ("NVIDIA A100", "NVIDIA A100 data sheet"),
    "v4": ("TPU v4", "Google Cloud TPU documentation, v4"),
    "v5e": ("TPU v5e", "Google Cloud TPU documentation, v5e"),
    "v5p": ("TPU v5p", "Google Cloud TPU documentation, v5p"),
    "v6e": ("TPU v6e", "Google Cloud TPU documentation, v6e"),
}
SHORTEST = 250  # steps: a run in its first transient obeys no power law
WARMUP = 20  # of them to the shortest run: long ones bend the exponents (Porian et al. 2024)
RATES = 3  # learning rates that the sweep tries for each size, at the least
APART = 1 + 4 * SAME  # one budget over the next, so that `fit_isoflop` tells them apart


@dataclass(frozen=True)
class Shape:
    """A GPT by its layers, width and heads."""

    num_layers: int
    embed_dim: int
    num_heads: int

    def __post_init__(self):
        if min(self.num_layers, self.embed_dim, self.num_heads) < 1:
            raise ValueError(f"layers, width and heads must be at least 1, got {self}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim, got {self.num_heads} and {self.embed_dim}"
            )

    @property
    def name(self) -> str:
        """Layers x width, as in the tables of a sweep."""
        return f"{self.num_layers}x{self.embed_dim}"

    @property
    def non_embedding(self) -> int:
        """Parameters as Kaplan et al. 2020 count them: `gpt.num_params`, in closed form.

        12 D^2 weights, 9 D biases and 4 D of norms in each layer; 2 D of the last norm.
        """
        d = self.embed_dim
        return self.num_layers * (12 * d * d + 13 * d) + 2 * d

    def params(self, vocab_size: int, seq_len: int) -> int:
        """Parameters with the tables of tokens and positions."""
        return self.non_embedding + (vocab_size + seq_len) * self.embed_dim

    def config(self, vocab_size: int, seq_len: int, dtype: Precision = "float32") -> GPTConfig:
        """The model of this shape on rows of `seq_len` tokens."""
        return GPTConfig(**asdict(self), vocab_size=vocab_size, max_len=seq_len, dtype=dtype)

    def flops_per_token(self, vocab_size: int, seq_len: int) -> int:
        """Of forward and backward, counted by `scaling.flops`."""
        return flops.gpt(self.config(vocab_size, seq_len), seq_len).train()


def ladder() -> tuple[Shape, ...]:
    """Shapes of 16 to 12288 wide, each of 1.3 to 2.1 times the parameters of the one before.

    Three widths to a doubling, four from 128 up, most of GPT-2's and GPT-3's among them. A layer
    for each 64 of width, for 128 from 4096 up, and between them for 2 sqrt(width): Brown et al.
    2020, table 2.1, but for its 350M, which is deeper. Heads are 64 wide, as in that table up to
    350M; below a width of 256 they are narrower, down to 8, so that most models have four or more
    and widths go up in small steps.
    """
    quarters = [(k, m) for k in range(5, 14) for m in (4, 5, 6, 7) if m < 7 or k >= 7]
    shapes = []
    for width in [16, 24, *(2**k * m // 4 for k, m in quarters)]:
        head = min(64, max(8, 2 ** (width.bit_length() - 3)))
        aspect = min(128.0, max(64.0, 2 * math.sqrt(width)))
        shapes.append(Shape(max(2, round(width / aspect)), width, width // head))
    return tuple(shape for shape in shapes if shape.embed_dim <= 12288)


@dataclass(frozen=True, kw_only=True)
class PlannedSize:
    """One size of a plan.

    Attributes:
      shape: of the model.
      learning_rate: where tuning starts.
      budgets: FLOPs that are meant, ascending.
      steps: of the run of each budget: multiples of `CHUNK`, ascending.
    """

    shape: Shape
    learning_rate: float
    budgets: tuple[float, ...]
    steps: tuple[int, ...]

    def __post_init__(self):
        name = self.shape.name
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate of {name}: wanted a positive number, got {self.learning_rate}"
            )
        if not self.steps:
            raise ValueError(f"{name} has no runs: wanted one at the least; or leave the size out")
        if any(s < CHUNK or s % CHUNK for s in self.steps) or not _ascending(self.steps):
            raise ValueError(
                f"steps of {name}: wanted ascending multiples of {CHUNK}, got {list(self.steps)}"
            )
        if not (_ascending(self.budgets) and self.budgets[0] > 0 and self.budgets[-1] < math.inf):
            raise ValueError(f"budgets of {name}: wanted ascending FLOPs, got {list(self.budgets)}")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a plan.

    Attributes:
      shape: of its model.
      budget: FLOPs that are meant.
      steps, tokens: its length.
      flops: of the whole run by itself, by `scaling.flops`.
      six_nd: 6 N D, embeddings included.
      trained_flops: what it adds to the sweep: from where the trunk of the budget before ends; a
        size's first run is trained at `RATES` learning rates.
      seconds: of `trained_flops` on the plan's hardware, or None.
      cost: of those seconds, in the currency of the plan's price, or None.
    """

    shape: Shape
    budget: float
    steps: int
    tokens: int
    flops: int
    six_nd: float
    trained_flops: int
    seconds: float | None
    cost: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid of runs, and what they take; attributes as in the module's schema."""

    sizes: tuple[PlannedSize, ...]
    seq_len: int
    batch_size: int
    warmup_steps: int
    vocab_size: int
    dtype: Precision = "float32"
    tokenizer: str = "bytes"
    data_path: str | None = None
    hardware: str | None = None
    chips: int = 1
    mfu: float = 0.4
    price: float | None = None
    assumptions: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "vocab_size", "chips", "warmup_steps"):
            if (value := getattr(self, name)) < (name != "warmup_steps"):
                raise ValueError(f"{name}: wanted a positive number, got {value}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu: wanted a part of one, such as 0.4, got {self.mfu}")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"price: wanted that of a chip hour, got {self.price}")
        if self.price is not None and self.hardware is None:
            raise ValueError("price: wanted the hardware too, whose hours it is of")
        if self.hardware is not None and self.hardware not in HARDWARE:
            raise ValueError(_unknown("hardware", self.hardware, HARDWARE))
        counts = [size.shape.params(self.vocab_size, self.seq_len) for size in self.sizes]
        if not self.sizes or not _ascending(counts):
            raise ValueError(f"sizes: wanted one or more, by rising parameters, got {counts}")

    @property
    def batch_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.seq_len

    @property
    def optimizer(self) -> OptimizerConfig:
        """What the sweep trains with."""
        return OptimizerConfig(schedule="wsd", warmup_steps=self.warmup_steps)

    def runs(self, size: PlannedSize) -> list[PlannedRun]:
        """The runs of one size, by rising budget."""
        shape, each = size.shape, size.shape.flops_per_token(self.vocab_size, self.seq_len)
        n = shape.params(self.vocab_size, self.seq_len)
        trained = trained_steps(self.optimizer, size.steps)
        rows = []
        for budget, steps, more in zip(size.budgets, size.steps, trained, strict=True):
            tokens, work = steps * self.batch_tokens, more * self.batch_tokens * each
            rows.append(
                PlannedRun(
                    shape=shape,
                    budget=budget,
                    steps=steps,
                    tokens=tokens,
                    flops=tokens * each,
                    six_nd=flops.six_nd(n, tokens),
                    trained_flops=work,
                    seconds=self.seconds(work),
                    cost=self.cost(work),
                )
            )
        return rows

    def grid(self) -> list[PlannedRun]:
        """All runs, by rising budget and size."""
        runs = [run for size in self.sizes for run in self.runs(size)]
        return sorted(runs, key=lambda run: run.budget)

    def seconds(self, work: int | float) -> float | None:
        """How long so many FLOPs take: work / (peak x MFU x chips); None without hardware."""
        if self.hardware is None:
            return None
        return work / (PEAK_FLOPS[HARDWARE[self.hardware][0]] * self.mfu * self.chips)

    def cost(self, work: int | float) -> float | None:
        """What so many FLOPs cost: chip hours x price; None without a price."""
        seconds = self.seconds(work)
        if seconds is None or self.price is None:
            return None
        return seconds / 3600 * self.chips * self.price

    def totals(self) -> dict[str, Any]:
        """Sums over all runs; `tokens` is the longest run's."""
        runs = self.grid()
        work = sum(run.trained_flops for run in runs)
        return {
            "runs": len(runs),
            "flops": sum(run.flops for run in runs),
            "trained_flops": work,
            "tokens": max(run.tokens for run in runs),
            "seconds": self.seconds(work),
            "cost": self.cost(work),
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as plain Python values: see the module's schema."""
        told = {"plan": VERSION} | {name: getattr(self, name) for name in _READ}
        sizes = []
        for size in self.sizes:
            shape, drop = size.shape, ("shape",)
            runs = [{k: v for k, v in vars(r).items() if k not in drop} for r in self.runs(size)]
            sizes.append(
                asdict(shape)
                | {
                    "params": shape.params(self.vocab_size, self.seq_len),
                    "params_no_embed": shape.non_embedding,
                    "flops_per_token": shape.flops_per_token(self.vocab_size, self.seq_len),
                    "learning_rate": size.learning_rate,
                    "runs": runs,
                }
            )
        rest = {"totals": self.totals(), "assumptions": list(self.assumptions)}
        return told | {"sizes": sizes} | rest


_READ: Mapping[str, tuple[type, ...]] = {  # what a plan file says of the whole plan, and its types
    **dict.fromkeys(("seq_len", "batch_size", "warmup_steps", "vocab_size"), (int,)),
    **dict.fromkeys(("dtype", "tokenizer"), (str,)),
    **dict.fromkeys(("data_path", "hardware"), (str, type(None))),
    "chips": (int,),
    "mfu": (float, int),
    "price": (float, int, type(None)),
}


def trained_steps(optimizer: OptimizerConfig, steps: Sequence[int]) -> list[int]:
    """Steps that each run of one size adds to a sweep, as `scaling.sweep` trains them.

    The first run is trained at `RATES` learning rates; of these the best goes on at its constant
    rate to where each further run's cool-down begins, and cools down from there. If the best of
    three rates is the highest or lowest, the sweep tries more, each for one more first run.
    """
    turns = [decay_start(optimizer, s) // CHUNK * CHUNK for s in steps]
    return [RATES * steps[0], *(s - turn for s, turn in zip(steps[1:], turns, strict=False))]


def read_plan(path: str) -> Plan:
    """Reads a plan that `lineage plan-sweep` wrote, edited perhaps.

    Raises:
      ValueError: the file is no plan, or an edit contradicts the rest of it.
      OSError: it cannot be read.
    """
    try:
        told = json.loads(epath.Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        told = None
    if not isinstance(told, dict) or told.get("plan") != VERSION:
        raise ValueError(
            f"{path} is not a plan: wanted the JSON that `lineage plan-sweep` writes, version "
            f"{VERSION}"
        )
    try:
        sizes = [
            PlannedSize(
                shape=Shape(*(_take(size, n, int) for n in Shape.__dataclass_fields__)),
                learning_rate=float(_take(size, "learning_rate", float, int)),
                budgets=tuple(float(_take(r, "budget", float, int)) for r in _rows(size, "runs")),
                steps=tuple(_take(r, "steps", int) for r in _rows(size, "runs")),
            )
            for size in _rows(told, "sizes")
        ]
        values = {name: _take(told, name, *kinds) for name, kinds in _READ.items()}
        if values["dtype"] not in get_args(Precision):
            names = ", ".join(get_args(Precision))
            raise ValueError(f"dtype: wanted one of {names}, got {values['dtype']!r}")
        values |= {n: float(values[n]) for n in ("mfu", "price") if values[n] is not None}
        said = tuple(map(str, _take(told, "assumptions", list)))
        plan = Plan(sizes=tuple(sizes), assumptions=said, **values)
        _agree("", told, plan.to_json())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return plan


def _take(told: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """A value of a plan file, if it is there and of a type that it may have."""
    value = told.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"{name}: wanted {wanted}, got {json.dumps(value)}")
    return value


def _rows(told: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    rows = _take(told, name, list)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name}: wanted a list of objects")
    return rows


def _agree(where: str, told: Any, meant: Any) -> None:
    """Raises if a plan file tells something else than what follows from what was read of it."""
    if isinstance(meant, dict):
        for name in (n for n in meant if isinstance(told, dict) and n in told):
            _agree(f"{where}.{name}" if where else name, told[name], meant[name])
    elif isinstance(meant, list):
        for i, (a, b) in enumerate(zip(told, meant, strict=False)):
            _agree(f"{where}[{i}]", a, b)
    elif told != meant and not (
        isinstance(meant, float) and isinstance(told, float | int) and math.isclose(told, meant)
    ):
        raise ValueError(
            f"{where}: wanted {meant}, which follows from the rest of the plan, got {told}; "
            "change what it follows from (shape, steps, ...), and leave this out"
        )


def _ascending(values: Sequence[int | float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def _unknown(kind: str, name: str, choices: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, choices, n=2, cutoff=0.5)
    meant = f"did you mean {' or '.join(close)}?" if close else f"have {', '.join(choices)}"
    return f"no {kind} is called {name!r}; {meant}"


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


@dataclass(frozen=True, kw_only=True)
class NextRun:
    """A run that could be added to a fit, and the prediction at the target with it.

    Attributes:
      shape, params, tokens, flops: the run.
      now, after: width of the 95 % interval of the loss at the target, without and with it.
    """

    shape: Shape
    params: int
    tokens: float
    flops: float
    now: float
    after: float

    @property
    def gain(self) -> float:
        """The part of the variance at the target that it is expected to take away."""
        return 1 - (self.after / self.now) ** 2

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the gain."""
        return vars(self) | {"shape": self.shape.name, "gain": self.gain}


def remaining_variance(
    target: Float[np.ndarray, "B"], seen: Float[np.ndarray, "B M"], noise: float
) -> Float[np.ndarray, "M"]:
    """The variance of f* once f(x) has been measured with noise, for each of M candidates x.

    var f* - cov(f*, f(x))^2 / (var f(x) + noise): exact where the draws are of a Gaussian. It does
    not depend on what is measured, so it is known before.

    Args:
      target: f* of each draw.
      seen: f(x) of each draw.
      noise: variance of one measurement.
    """
    t, s = target - target.mean(), seen - seen.mean(0)
    count = len(t) - 1
    spread = (s**2).sum(0) / count + noise
    told = np.divide((t @ s / count) ** 2, spread, out=np.zeros_like(spread), where=spread > 0)
    return t @ t / count - told


def next_runs(fitted: Fit, target: tuple[float, float], plan: Plan) -> list[NextRun]:
    """Runs on the ladder between the plan's ends, best first by what they add to a fit.

    f is the logarithm of the loss (the loss itself if that is what was fitted) over the bootstrap
    draws; the noise is the variance of the fit's residuals, from their median absolute deviation,
    inflated by n / (n - p).

    Args:
      fitted: with bootstrap draws.
      target: (params, tokens) of the run to be predicted.
      plan: its shapes at its budgets, each with each, are the candidates.

    Raises:
      ValueError: the fit has no draws, or is no law of params and tokens.
    """
    if not fitted.has_optimum:
        raise ValueError(f"{fitted.law.name} is not a law of params and tokens: fit another")
    if not fitted.draws:
        raise ValueError("a fit without bootstrap draws has no interval: fit with --bootstrap 1000")
    v, t = plan.vocab_size, plan.seq_len
    ends = [plan.sizes[i].shape.params(v, t) for i in (0, -1)]
    shapes = [shape for shape in ladder() if ends[0] <= shape.params(v, t) <= ends[1]]
    budgets = sorted({budget for size in plan.sizes for budget in size.budgets})
    candidates = [
        (shape, shape.params(v, t), c / shape.flops_per_token(v, t), c)
        for shape in shapes
        for c in budgets
        if c / shape.flops_per_token(v, t) >= SHORTEST * plan.batch_tokens
    ]
    x = {
        "params": np.array([target[0], *(n for _, n, _, _ in candidates)]),
        "tokens": np.array([target[1], *(d for _, _, d, _ in candidates)]),
    }
    drawn = {name: values[:, None] for name, values in fitted.draws.items()}
    f = evaluate(fitted.law, drawn, x)
    f = f if fitted.linear else np.log(f)
    f = f[np.isfinite(f).all(1)]
    r = fitted.residuals
    spare = fitted.n_runs - len(fitted.certificate["free"])
    deviation = 1.4826 * np.median(np.abs(r - np.median(r)))  # of a Gaussian: its sigma
    noise = float(deviation**2 * fitted.n_runs / max(spare, 1))
    after = remaining_variance(f[:, 0], f[:, 1:], noise)
    loss = 1.0 if fitted.linear else float(fitted.predict(params=target[0], tokens=target[1]).loss)

    def width(variance: float) -> float:
        return 2 * 1.96 * math.sqrt(max(variance, 0.0)) * loss

    now = width(float(f[:, 0].var(ddof=1)))
    rows = [
        NextRun(shape=shape, params=n, tokens=d, flops=c, now=now, after=width(float(left)))
        for (shape, n, d, c), left in zip(candidates, after, strict=True)
    ]
    return sorted(rows, key=lambda row: row.after)


def plan_file(options: PlanOptions) -> list[Any]:
    """Plans, writes the plan, and gives back what to show: tables and lines.

    Raises:
      ValueError: an option, or the fit, is not what a plan needs.
      OSError: the fit cannot be read, or the plan written.
    """
    fitted = None if options.fit is None else read_fit(options.fit)
    plan = make_plan(options, fitted)
    told = plan.to_json()
    shown = [size_table(plan), "", run_table(plan), "", *total_lines(plan), "", *plan.assumptions]
    target = None
    if fitted and options.target:
        best = fitted.optimal(options.target)
        target = (float(best.params), float(best.tokens))
    elif options.target_params and options.target_tokens:
        target = (options.target_params, options.target_tokens)
    if fitted and target:
        runs = next_runs(fitted, target, plan)
        first, last = next_lines(fitted, target, runs)
        shown += ["", first, "", next_table(runs), "", last]
        cautions = [f"Caution: {text}." for text in fitted.cautions(options.target or 0.0)]
        shown += [text for text in cautions if text not in plan.assumptions]
        told["next"] = [run.to_json() for run in runs]
    write_json(options.json, told)
    return [*shown, "", f"Written to {options.json}; train it with `lineage sweep {options.json}`"]


def size_table(plan: Plan) -> Table:
    """The sizes, for a terminal."""
    table = _table(
        "layers x width", "heads", "params", "no embed.", "FLOPs/token", "first rate", "runs"
    )
    for size in plan.sizes:
        shape = size.shape
        table.add_row(
            shape.name.replace("x", " x "),
            f"{shape.num_heads} x {shape.embed_dim // shape.num_heads}",
            quantity(shape.params(plan.vocab_size, plan.seq_len)),
            quantity(shape.non_embedding),
            quantity(shape.flops_per_token(plan.vocab_size, plan.seq_len)),
            f"{size.learning_rate:.2g}",
            str(len(size.steps)),
        )
    return table


def run_table(plan: Plan) -> Table:
    """The runs, budget by budget, for a terminal."""
    names = ["size", "tokens", "D/N", "steps", "FLOPs", "6ND", "trained"]
    names += ["time"] if plan.hardware else []
    names += ["cost"] if plan.price is not None else []
    table, grid = _table(*names), plan.grid()
    for run, after in zip(grid, [*grid[1:], None], strict=True):
        n = run.shape.params(plan.vocab_size, plan.seq_len)
        cells = [
            run.shape.name,
            quantity(run.tokens),
            quantity(run.tokens / n),
            quantity(run.steps),
            *(_short(work) for work in (run.flops, run.six_nd, run.trained_flops)),
        ]
        cells += [] if run.seconds is None else [duration(run.seconds)]
        cells += [] if run.cost is None else [f"{run.cost:,.2f}"]
        table.add_row(*cells, end_section=after is None or after.budget != run.budget)
    return table


def total_lines(plan: Plan) -> list[str]:
    """The sums, for a terminal."""
    totals = plan.totals()
    line = f"In all {totals['runs']} runs of {len(plan.sizes)} sizes, "
    line += f"{totals['trained_flops']:.3g} FLOPs trained"
    if plan.hardware:
        line += f", {duration(totals['seconds'])} on {plan.chips} x {plan.hardware}"
    if plan.price is not None:
        line += f", {totals['cost']:,.2f} at {plan.price:g} a chip hour"
    return [line]


def next_lines(
    fitted: Fit, target: tuple[float, float], runs: Sequence[NextRun]
) -> tuple[str, str]:
    """What is said before and after the table of next runs."""
    n, d = target
    loss = float(fitted.predict(params=n, tokens=d).loss)
    cheap = max(runs, key=lambda run: run.gain / run.flops)
    return (
        f"Next run, by {fitted.law.name}: the loss of {quantity(n)} parameters on {quantity(d)} "
        f"tokens, {loss:.4f}, has a 95 % interval {runs[0].now:.4f} wide; expected after one run "
        "more:",
        f"Most for its FLOPs: {cheap.shape.name} on {quantity(cheap.tokens)} tokens, "
        f"{_short(cheap.flops)} FLOPs, to {cheap.after:.4f}.",
    )


def next_table(runs: Sequence[NextRun], number: int = 5) -> Table:
    """The first few of the next runs."""
    table = _table("size", "params", "tokens", "FLOPs", "width now", "after", "less variance")
    for run in runs[:number]:
        table.add_row(
            run.shape.name,
            quantity(run.params),
            quantity(run.tokens),
            _short(run.flops),
            f"{run.now:.4f}",
            f"{run.after:.4f}",
            f"{run.gain:.1%}",
        )
    return table


def duration(seconds: float | None) -> str:
    """A time for people: 3.2 s, 14 min, 2.5 h, 3.1 d."""
    value, name = seconds or 0.0, "s"
    for unit, longer in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if value >= unit:
            value, name = value / unit, longer
            break
    return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"


def quantity(count: int | float) -> str:
    """A count for people."""
    return _quantity(float(count))


def _short(work: int | float) -> str:
    """FLOPs in seven letters."""
    return f"{work:.2e}".replace("e+", "e")


def _table(first: str, *names: str) -> Table:
    """A table whose columns but the first are numbers, narrow enough for 80 letters."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table
