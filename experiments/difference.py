"""What a child changed of its parent: settings, parameters, cost, side by side."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from experiments.speaking import LANGUAGE_MODELS, TRANSLATORS
from lineage_jax import lineage

NOTHING = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing, as it is in the one and in the other.

    Attributes:
      part: of the table: "paper", "settings", "parameters" or "cost".
      name: of the thing.
      left, right: what it is there; empty where there is no such thing.
    """

    part: str
    name: str
    left: str
    right: str


def difference(left: str, right: str, preset: str | None = None) -> list[Row]:
    """Two milestones at one of their sizes; of settings and parameters, what differs.

    Args:
      left, right: names of milestones.
      preset: of both; the first of each if not given.

    Raises:
      ValueError: if there is no such milestone or preset.
    """
    names = lineage.find(left).name, lineage.find(right).name
    experiments = [chosen(name, preset) for name in names]
    found = [Row("paper", key, *pair) for key, pair in papers(*names).items()]
    both = [settings(one.model) for one in experiments]
    found += [Row("settings", *row) for row in unlike(*both)]
    both = [shapes(one.program()) for one in experiments]
    found += [Row("parameters", *row) for row in unlike(*both)]
    both = [cost(one) for one in experiments]
    return found + [Row("cost", name, both[0][name], both[1][name]) for name in both[0]]


def chosen(name: str, preset: str | None) -> Any:
    """The experiment of a milestone."""
    presets = importlib.import_module(f"experiments.{name}").PRESETS
    if preset is not None and preset not in presets:
        raise ValueError(f"{name} has no preset {preset!r}; have {', '.join(presets)}")
    return presets[preset or next(iter(presets))]()


def papers(*names: str) -> dict[str, tuple[str, ...]]:
    """What the lineage says of the milestones."""
    ones = [lineage.find(name) for name in names]
    return {
        "milestone": tuple(f"{one.title} ({one.year})" for one in ones),
        "paper": tuple(one.paper for one in ones),
        "what is new": tuple(one.new for one in ones),
    }


def settings(config: Any) -> dict[str, str]:
    """The fields of a config by name, those of configs in it with a dot.

    Where attention is full, as it is where nothing is said of it, nothing is told of another.
    """
    found: dict[str, str] = {}
    full = getattr(config, "attention", None) == "full"
    for field in dataclasses.fields(config):
        if full and field.name in ("attention", "sparse"):
            continue
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = settings(value).items()
            found |= {f"{field.name}.{name}": told for name, told in inner}
        else:
            found[field.name] = str(value)
    return found


def shapes(program: Any) -> dict[str, str]:
    """The shape of each parameter by its path."""
    boxed, _ = jax.eval_shape(program.init, jax.random.key(0))
    flat: Mapping[str, Any] = flatten_dict(nn.meta.unbox(boxed), sep="/")
    return {path: " x ".join(map(str, leaf.shape)) for path, leaf in flat.items()}


def unlike(left: Mapping[str, str], right: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(name, left, right) of what is not the same in both, those of both first."""
    shared = [name for name in left if name in right and left[name] != right[name]]
    alone = [name for name in (*left, *right) if (name in left) != (name in right)]
    return [(name, left.get(name, NOTHING), right.get(name, NOTHING)) for name in shared + alone]


def cost(experiment: Any) -> dict[str, str]:
    """Parameters, FLOPs and memory, in numbers to be compared."""
    program = experiment.program()
    boxed, _ = jax.eval_shape(program.init, jax.random.key(0))
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.meta.unbox(boxed)))
    grows = cache_bytes(experiment.model)
    return {
        "parameters": f"{params:,}",
        "FLOPs a token, forward and backward": f"{program.flops_per_token:,}",
        "bytes of cache a token": NOTHING if grows is None else f"{grows:,}",
    }


def cache_bytes(config: Any) -> int | None:
    """Bytes that each token written adds to what decoding keeps; None where nothing is written.

    A recurrence adds none; where one key is kept for several tokens, each adds its share.
    """
    make: Callable[[int], Any]
    if type(config) in LANGUAGE_MODELS:
        _, empty_cache = LANGUAGE_MODELS[type(config)]
        make = lambda length: empty_cache(config, 1, length)  # noqa: E731
    elif type(config) in TRANSLATORS:
        module, ids = TRANSLATORS[type(config)](config), jnp.zeros((1, 2), jnp.int32)

        def make(length: int) -> Any:
            variables = module.init(jax.random.key(0), ids, ids)
            return module.apply(variables, ids, None, length, method="start")
    else:
        return None

    def size(length: int) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(lambda: make(length)))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return (size(66) - size(2)) // 64
