"""Models that were trained, or that somebody else trained: opened by the path of their folder."""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from lineage_jax import lineage, sharding
from lineage_jax.pretrained import Pretrained, load
from lineage_jax.train.checkpoint import Checkpoints
from lineage_jax.train.state import TrainState
from lineage_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Saved:
    """A run of ours, as it stood at its last checkpoint.

    Attributes:
      milestone: what it trained.
      experiment: its settings.
      step: after how many steps.
      params: of the model.
    """

    milestone: str
    experiment: Any
    step: int
    params: Params


def is_run(folder: epath.PathLike) -> bool:
    """Whether the folder is a run of ours."""
    return (epath.Path(folder).expanduser() / "env.json").exists()


def recorded(folder: epath.PathLike) -> tuple[str, Any]:
    """The milestone of a run, and its settings.

    Raises:
      OSError: if it is none.
      ValueError: if its settings are not those of this version.
    """
    place = epath.Path(folder).expanduser()
    if not is_run(place):
        raise FileNotFoundError(f"{folder}: wanted the directory of a run, found no env.json")
    env, config = (json.loads((place / name).read_text()) for name in ("env.json", "config.json"))
    name = lineage.find(env.get("milestone", "")).name
    preset = importlib.import_module(f"experiments.{name}").experiment()
    try:
        return name, filled(preset, config)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder}: config.json is not of this version ({error})") from error


def abstract_state(experiment: Any) -> TrainState:
    """The shapes of a run's state, all of it on the first device."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    return experiment.program().abstract_state(mesh)


def open_run(folder: epath.PathLike) -> Saved:
    """The settings and the last intact parameters of a run.

    Raises:
      OSError: if it is none, or has no checkpoint that is intact.
      ValueError: if its settings are not those of this version.
    """
    name, experiment = recorded(folder)
    place = epath.Path(folder).expanduser()
    with Checkpoints(place / "checkpoints", keep=None) as checkpoints:
        restored = checkpoints.restore_latest(abstract_state(experiment))
    if restored is None:
        raise FileNotFoundError(f"{folder}: no checkpoint was saved yet")
    step, state, _ = restored
    return Saved(name, experiment, step, state.params)


def open_model(folder: epath.PathLike) -> Saved | Pretrained:
    """A run of ours, or a Hugging Face folder.

    Raises:
      OSError: if it is neither.
      ValueError: if it is one that cannot be read.
    """
    return open_run(folder) if is_run(folder) else load(folder)


def filled(default: Any, values: Mapping[str, Any]) -> Any:
    """The config with the values that JSON has of it.

    Raises:
      TypeError: for a name that it does not have.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        old = getattr(default, name, None)
        if dataclasses.is_dataclass(old) and isinstance(value, Mapping):
            value = filled(old, value)
        elif isinstance(value, list):
            value = tuple(value)
        found[name] = value
    return dataclasses.replace(default, **found)
