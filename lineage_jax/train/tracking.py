"""Metrics to TensorBoard or Weights & Biases, besides metrics.jsonl (the extra `track`)."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
from etils import epath

from lineage_jax.train.metrics import Writer

INSTALL = "install it with: python -m pip install 'lineage-jax[track]'"


class TensorBoard:
    """Event files in `folder/tensorboard`."""

    def __init__(self, folder: epath.PathLike):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(f"--train.track tensorboard needs tensorboardX; {INSTALL}") from error
        self._writer: Any = SummaryWriter(str(epath.Path(folder) / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project "lineage_jax", named after the folder and resumed with it."""

    def __init__(self, folder: epath.PathLike):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"--train.track wandb needs wandb; {INSTALL}") from error
        name = epath.Path(folder).name
        self._run: Any = wandb.init(project="lineage_jax", name=name, id=name, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_writers(
    track: Literal["none", "tensorboard", "wandb"], folder: epath.PathLike
) -> list[Writer]:
    """The writers that a config asks for; on the first process only."""
    if track == "none" or jax.process_index() != 0:
        return []
    return [TensorBoard(folder) if track == "tensorboard" else WeightsAndBiases(folder)]
