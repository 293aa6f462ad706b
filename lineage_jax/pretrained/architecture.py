"""What `load` and `save` must know of one of their architectures."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.pretrained.tensors import Table

Settings = Mapping[str, Any]
"""Their config, as config.json spells it."""

Call = Callable[..., dict[str, jax.Array]]
"""(module, params, **inputs under their names) -> outputs under their names."""

TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)
"""A row of ids, as a module's `init` takes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one of their classes of models is one of ours.

    Attributes:
      model_type: as their config.json calls it.
      name: of their class, as their config.json lists it.
      config: ours from theirs; raises ValueError for settings that we do not have.
      settings: theirs from ours.
      table: where each of our parameters is found, for a config of ours.
      module: builds our model of a config.
      call: runs it.
      limits: for a config of ours, below what the ids of each input must be.
      prefix: before the names of tensors that their class without a head has too, without it: a
        folder may hold either.
      ignored: how names end of what old folders hold besides parameters.
      tied: for a config of ours, of what they may store again under another name, that other name
        and the tensor's.
      tied_bias: of the bias of a head, its two names; where the head is not tied they still store
        both, and compute with the first.
      renamed: how names end in older folders, and how they end now.
      poolerless: the same class for a folder without a pooler.
      example: what `module.init` takes after its key.
    """

    model_type: str
    name: str
    config: Callable[[Settings], Any]
    settings: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Table]
    module: Callable[[Any], nn.Module]
    call: Call
    limits: Callable[[Any], Mapping[str, int]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    tied: Callable[[Any], Mapping[str, str]] = lambda config: {}
    tied_bias: tuple[str, str] | None = None
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    poolerless: "Architecture | None" = None
    example: tuple[Any, ...] = (TOKENS,)


def check(theirs: Settings, **wanted: Any) -> None:
    """Refuses settings that change what a model computes in a way that ours does not.

    Args:
      theirs: the config.
      **wanted: of each setting, the value that it must have if it is given, or a tuple of such.

    Raises:
      ValueError: naming the setting.
    """
    for name, values in wanted.items():
        values = values if isinstance(values, tuple) else (values,)
        if theirs.get(name, values[0]) not in values:
            choices = " or ".join(repr(value) for value in values)
            raise ValueError(f"wanted {name} {choices}, got {theirs[name]!r}")


def check_reads(config: Any) -> None:
    """Refuses a decoder of ours that does not read all of its past, as theirs do.

    Raises:
      ValueError: naming what it has.
    """
    if config.attention != "full":
        raise ValueError(
            f"their class has full attention and no other, got attention={config.attention!r}"
        )


def tied(table: str) -> Callable[[Any], Mapping[str, str]]:
    """What an architecture says of a head that is that table where our config ties them."""
    return lambda config: {"lm_head.weight": table} if config.tied_embeddings else {}


def without_head(
    architecture: Architecture, name: str, output: str = "logits", **ours: Any
) -> Architecture:
    """Their class of the same model without its head: what `AutoModel` makes.

    Args:
      architecture: with the head, whose config has `tied_embeddings`.
      name: of their class.
      output: that the head makes.
      **ours: settings of our config without a head, besides tied embeddings.
    """
    bare = architecture.prefix

    def config(theirs: Settings) -> Any:
        return dataclasses.replace(architecture.config(theirs), tied_embeddings=True, **ours)

    def settings(config: Any) -> dict[str, Any]:
        found = architecture.settings(config)
        return {key: value for key, value in found.items() if key != "tie_word_embeddings"}

    def table(config: Any) -> Table:
        return {
            path: dataclasses.replace(row, name=row.name.removeprefix(bare))
            for path, row in architecture.table(config).items()
        }

    def twice(config: Any) -> dict[str, str]:
        found = architecture.tied(config).items()
        return {again.removeprefix(bare): name.removeprefix(bare) for again, name in found}

    @functools.wraps(architecture.call)
    def call(*arguments: Any, **inputs: Any) -> dict[str, jax.Array]:
        outputs = architecture.call(*arguments, **inputs)
        return {key: value for key, value in outputs.items() if key != output}

    return dataclasses.replace(
        architecture,
        name=name,
        config=config,
        settings=settings,
        table=table,
        call=call,
        prefix="",
        tied=twice,
    )
