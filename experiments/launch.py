"""From a scaling fit to a run: `lineage launch FIT.json --flops 1e24 --chip v5p`.

The fit says how many parameters and tokens are best for the compute; the nearest shape of a family
becomes an experiment; the compiler says which slice holds it, on which mesh, and how fast it is.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Iterator
from typing import Any, Literal

from experiments.sizes import FAMILIES, Count
from experiments.slices import Chosen, in_time, slices, smallest
from lineage_jax.pods import CHIPS, Topology
from lineage_jax.pods.plan import duration
from lineage_jax.train.metrics import config_json, write_json
from scaling.allocation import Optimal
from scaling.commands import OptimalOptions, allocated, best_lines, cautions, heading, nats
from scaling.fit import Fit, Prediction, read_fit
from scaling.plan import batch_rule, rate_rule
from scaling.study import quantity

WARMUP = 20  # steps of a run to one of its warm-up, at the least, as in `scaling.plan`


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions(OptimalOptions):
    """What to train, and on what."""

    chip: str | None = None
    """v4, v5e, v5p, v6e or tpu7x: the smallest slice of them is found that holds the step."""
    topology: str | None = None
    """This slice instead, such as v5p:8x8x8."""
    days: float | None = None
    """With --chip: the smallest slice that is done in so many days."""
    experiment: Literal["llama", "gpt"] = "llama"
    """The family of the model; its other settings are those of its preset of 7B."""
    count: Count = "total"
    """What the fit's N counts: all parameters, or those without embeddings, as Kaplan's laws do."""
    seq_len: int | None = None
    """Tokens in a row; if not given, the preset's 2048."""
    batch_tokens: int | None = None
    """Tokens in a step; if not given, by DeepSeek-AI's rule, in a power of two of rows."""
    vocab_size: int | None = None
    """Of the model; if not given, of the released ones."""
    data_path: str | None = None
    """The text, as --data.path of lineage train."""
    search: bool = False
    """Try what is recomputed and the rows of a micro-batch as well as meshes: up to 48 steps to
    compile, of minutes each, for each slice."""

    def __post_init__(self):
        super().__post_init__()
        if (self.chip is None) == (self.topology is None):
            raise ValueError("wanted --chip, such as v5p, or --topology, such as v5p:8x8x8")
        if self.chip is not None and self.chip not in CHIPS:
            raise ValueError(f"--chip: wanted one of {', '.join(CHIPS)}, got {self.chip!r}")
        if self.topology is not None:
            Topology.parse(self.topology)
            if self.days is not None:
                raise ValueError("--days finds the slice: wanted --chip with it, not --topology")
        for name in ("days", "seq_len", "batch_tokens", "vocab_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: wanted a positive number, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """A run that a fit suggests.

    Attributes:
      options: what was asked for; `path` is the fit's.
      fitted: the fit.
      best: N*, D* and the loss there.
      params: of the real shape, counted as the fit does.
      tokens: that it is trained on: the same compute as `best`, in whole steps.
      loss: predicted for these two.
      chosen: the experiment, on which slice, and the plan of its step.
    """

    path: str
    options: LaunchOptions
    fitted: Fit
    best: Optimal
    params: int
    tokens: int
    loss: Prediction
    chosen: Chosen

    @property
    def warnings(self) -> list[str]:
        """What to know before the money is spent."""
        said = cautions(self.fitted, float(self.best.flops))
        if self.options.data_path is None:
            said.append(
                f"without --data-path it reads Python's own text, ten million bytes, not "
                f"{quantity(self.tokens)} tokens"
            )
        return said

    def command(self) -> str:
        """The line that trains it, on every host of the slice."""
        name = self.options.experiment
        folder = f"runs/{name}-{self.options.flops:g}"
        words = [*train_arguments(name, self.chosen.experiment), "--run-dir", folder, "--resume"]
        return shlex.join(["lineage", "train", *words])

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {
            "law": self.fitted.law.name,
            "fit": self.path,
            "optimal": dataclasses.asdict(self.best),
            "params": self.params,
            "tokens": self.tokens,
            "loss": dataclasses.asdict(self.loss),
            "experiment": config_json(self.chosen.experiment),
            "plan": json.loads(self.chosen.plan.to_json()),
            "command": self.command(),
            "warnings": self.warnings,
        }

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        experiment, plan = self.chosen.experiment, self.chosen.plan
        model, config = experiment.model, experiment.train
        top = self.fitted.flops_max
        yield heading(self.fitted, self.path) + (f"; runs of up to {top:.2g} FLOPs" if top else "")
        served = self.options.inference_tokens
        yield f"best with {quantity(served)} tokens to serve:" if served else "compute-optimal:"
        yield from best_lines(self.best)
        yield ""
        yield (
            f"{self.options.experiment}: {model.num_layers} layers, {model.embed_dim} wide, "
            f"{model.num_heads} heads, vocabulary {model.vocab_size:,}: {self.params:,} parameters"
            f"{'' if self.options.count == 'total' else ' without embeddings'}, "
            f"{self.params / self.best.params - 1:+.1%} from N*"
        )
        yield (
            f"trained on {quantity(self.tokens)} tokens, {self.tokens / self.best.tokens - 1:+.1%} "
            f"from D*: {config.num_steps:,} steps of {experiment.data.batch_size:,} rows of "
            f"{experiment.data.seq_len:,}"
        )
        drawn = self.loss.low is not None
        span = f"  [{nats(self.loss.low)}, {nats(self.loss.high)}]" if drawn else ""
        yield f"predicted loss {nats(self.loss.loss)}{span}"
        yield ""
        mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
        yield f"{plan.topology}: {plan.chips:,} chips, mesh {mesh}"
        yield (
            f"micro-batches {config.accumulate}, recomputed: {model.remat}; "
            f"{plan.hbm_total / 2**30:.1f} of {plan.hbm_limit / 2**30:.1f} GiB of a device"
        )
        cost = "no price known" if plan.cost is None else f"{plan.cost:,.0f} USD"
        yield f"step {duration(plan.seconds)}, MFU {plan.mfu:.1%}, {plan.days:,.1f} days, {cost}"
        yield "assumed:"
        yield from (f"  - {line}" for line in plan.assumptions)
        yield ""
        yield "on every host:"
        flags = " ".join(self.chosen.topology.chip.flags)
        yield f"  export LIBTPU_INIT_ARGS={shlex.quote(flags)}"
        yield f"  {self.command()}"


def launch_file(path: str, options: LaunchOptions, say: Callable[[str], None]) -> list[str]:
    """What `lineage launch` says of a fit on disk, as lines for the terminal.

    Raises:
      ValueError: the file is no fit, or nothing that was asked for can be trained.
      ImportError: libtpu is not installed.
      OSError: the fit cannot be read.
    """
    made = launch(path, options, say)
    lines = ["", *made.lines()]
    if options.json:
        write_json(options.json, made.to_json())
        lines.append(f"Written to {options.json}")
    return [*lines, *(f"Warning: {text}" for text in made.warnings)]


def launch(path: str, options: LaunchOptions, say: Callable[[str], None]) -> Launch:
    """Finds the model, the tokens, the slice and the mesh; as `launch_file`."""
    fitted = read_fit(path, options.law)
    best = allocated(fitted, options, options.inference_tokens)
    experiment, params, tokens = sized(fitted, best, options)
    if options.topology is not None:
        choices = [Topology.parse(options.topology)]
    else:
        choices = slices(CHIPS[str(options.chip)], params)
    if options.days is None:
        chosen = smallest(experiment, choices, float(tokens), say, options.search)
    else:
        chosen = in_time(experiment, choices, float(tokens), options.days, say, options.search)
    interval = options.interval if fitted.draws else None
    loss = fitted.predict(params=params, tokens=tokens, interval=interval)
    return Launch(
        path=path,
        options=options,
        fitted=fitted,
        best=best,
        params=params,
        tokens=tokens,
        loss=loss,
        chosen=chosen,
    )


def sized(fitted: Fit, best: Optimal, options: LaunchOptions) -> tuple[Any, int, int]:
    """The experiment of a real shape for N*, its parameters, and tokens for the same compute."""
    family = FAMILIES[options.experiment]
    experiment = family.experiment(
        float(best.params),
        count=options.count,
        seq_len=options.seq_len,
        vocab_size=options.vocab_size,
    )
    params = family.num_params(experiment.model)[options.count]
    k, p = fitted.cost
    flops, seq_len = float(best.flops), experiment.data.seq_len
    wanted = flops / (k * params**p)
    batch_tokens = options.batch_tokens or batch_rule(flops, seq_len, wanted)
    if batch_tokens % seq_len:
        raise ValueError(
            f"--batch-tokens: wanted a multiple of the {seq_len} tokens of a row, got "
            f"{batch_tokens}"
        )
    num_steps = round(wanted / batch_tokens)
    if num_steps < 1:
        raise ValueError(f"{quantity(wanted)} tokens are less than a step of {batch_tokens:,}")
    optimizer = experiment.optimizer
    experiment = dataclasses.replace(
        experiment,
        data=dataclasses.replace(
            experiment.data, path=options.data_path, batch_size=batch_tokens // seq_len
        ),
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate=float(f"{rate_rule(flops, batch_tokens):.2g}"),
            warmup_steps=min(optimizer.warmup_steps, num_steps // WARMUP),
        ),
        train=dataclasses.replace(experiment.train, num_steps=num_steps),
    )
    return experiment, params, num_steps * batch_tokens


def train_arguments(name: str, experiment: Any) -> list[str]:
    """What `lineage train` must be told to train an experiment: how it differs from a preset."""
    family = FAMILIES[name]
    words = [name, "--preset", family.preset]
    start = family.presets[family.preset]()
    for part in dataclasses.fields(experiment):
        old, new = getattr(start, part.name), getattr(experiment, part.name)
        for field in dataclasses.fields(new):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                option = f"{part.name}.{field.name}".replace("_", "-")
                words += [f"--{option}", str(value)]
    return words
