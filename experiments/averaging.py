"""The mean of a run's last checkpoints, which translates better than the last one alone.

Vaswani et al. 2017, section 6.1: the last 5 for the base model, the last 20 for the big one.
"""

import dataclasses
import json
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.saved import abstract_state, recorded
from lineage_jax.train.checkpoint import Checkpoints
from lineage_jax.train.metrics import write_json
from lineage_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Which checkpoints, and where their mean goes."""

    last: int = 5
    """Checkpoints to average (Vaswani et al. 2017, section 6.1); a run keeps as many as
    --train.keep-checkpoints says."""
    out: str | None = None
    """The directory to write; if not given, the run's own and "-averaged"."""

    def __post_init__(self):
        if self.last < 2:
            raise ValueError(f"last must be at least 2, got {self.last}")


def average_run(folder: str, options: AverageOptions) -> str:
    """Writes the mean as a run of its own, which every command reads; says where.

    Raises:
      OSError: if the folder is no run, or a checkpoint is damaged.
      ValueError: if the run has fewer checkpoints, or there is something in the way.
    """
    _, experiment = recorded(folder)
    place = epath.Path(folder).expanduser()
    out = epath.Path(options.out or f"{place}-averaged").expanduser()
    if out.exists():
        raise ValueError(f"{out} is there already; choose another --out")
    like = abstract_state(experiment)
    with Checkpoints(place / "checkpoints", keep=None) as checkpoints:
        steps = checkpoints.saved_steps()[: options.last]
        if len(steps) < options.last:
            raise ValueError(
                f"{folder} has {len(steps)} checkpoints, wanted {options.last}; take a lower "
                "--last, or train with more --train.keep-checkpoints"
            )
        state = checkpoints.restore(steps[0], like)
        if experiment.program().in_use(state.params, state.extra) is not state.params:
            raise ValueError(
                f"{folder} averages its parameters as it trains (NT-ASGD), and that average is "
                "what is used; take the run as it is"
            )
        others = (checkpoints.restore(step, like).params for step in steps[1:])
        params = mean(state.params, others, len(steps))
    with Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save(steps[0], state.replace(params=params))
    write_json(out / "config.json", json.loads((place / "config.json").read_text()))
    env = json.loads((place / "env.json").read_text())
    write_json(out / "env.json", {**env, "averaged": {"run": str(folder), "steps": steps[::-1]}})
    return f"{out}: the mean of steps {', '.join(map(str, steps[::-1]))}"


def mean(first: Params, others: Iterable[Params], count: int) -> Params:
    """The mean of as many trees, in the types of the first; summed in float64, one at a time."""
    total = jax.tree.map(lambda x: np.asarray(x, np.float64), first)
    for other in others:
        total = jax.tree.map(np.add, total, other)
    return jax.tree.map(lambda x, like: jnp.asarray(x / count, like.dtype), total, first)
