"""What a plan says, what it takes, and its JSON; the schema stands in `scaling.plan`."""

import difflib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from etils import epath

from lineage_jax.train.metrics import PEAK_FLOPS
from lineage_jax.train.optim import OptimizerConfig, decay_start
from lineage_jax.typing import Precision
from scaling import flops
from scaling.plan.shapes import Shape
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
RATES = 3  # learning rates that the sweep tries for each size, at the least


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
