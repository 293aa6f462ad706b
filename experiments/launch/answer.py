"""What `lineage launch` answers: a run, as a person reads it, as JSON, and as a command."""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from typing import Any

from experiments.launch.options import LaunchOptions
from experiments.launch.sizes import FAMILIES
from experiments.launch.slices import Chosen
from lineage_jax.pods.plan import duration
from lineage_jax.train.metrics import config_json
from scaling.allocation import Optimal
from scaling.commands import best_lines, cautions, heading, nats
from scaling.fit import Fit, Prediction
from scaling.study import quantity


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
        top, work = self.fitted.flops_max, experiment.program().flops_per_token * self.tokens
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
            f"{experiment.data.seq_len:,}; {work:.3g} FLOPs, counted from the shape"
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
