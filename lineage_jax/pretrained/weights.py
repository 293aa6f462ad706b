"""A model of theirs, run and written by ours."""

import collections
import dataclasses
import difflib
import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict

from lineage_jax.pretrained import albert, bert, distilbert, gpt, llama, marian, roberta, t5
from lineage_jax.pretrained.architecture import Architecture, Settings
from lineage_jax.pretrained.folders import read_config, read_tensors, write_folder
from lineage_jax.pretrained.tensors import to_ours, to_theirs
from lineage_jax.typing import Params

ARCHITECTURES: Mapping[str, Architecture] = {
    one.name: one
    for family in (gpt, bert, roberta, albert, distilbert, llama, marian, t5)
    for one in family.ARCHITECTURES
}
"""By the name of their class. Of one model type, the first is the one that a config means that
names none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model with its weights, called and saved under Hugging Face names.

    Attributes:
      config: of our model.
      module: our model.
      params: its parameters.
      architecture: which class of theirs it is.
      theirs: what else their config.json said.
    """

    config: Any
    module: nn.Module
    params: Params
    architecture: Architecture
    theirs: Settings = dataclasses.field(default_factory=dict)

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray]:
        """Their outputs by name (`logits`, `last_hidden_state`, ...), float32.

        Args:
          **inputs: their inputs by name, such as `input_ids` and `attention_mask`, [B, T].

        Raises:
          ValueError: if a name is unknown, one is missing, shapes differ, or an id has no row in
            its table.
        """
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        check_inputs(arrays, self.architecture, self.config)
        outputs = self._run(self.params, arrays)
        return {name: np.asarray(array, np.float32) for name, array in outputs.items()}

    @functools.cached_property
    def _run(self):
        return jax.jit(lambda params, inputs: self.architecture.call(self.module, params, **inputs))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `transformers` loads.

        Raises:
          FileExistsError: if the folder holds a model already.
          ValueError: if their class has no place for a setting or a parameter of ours.
        """
        architecture = self.architecture
        settings = architecture.settings(self.config)
        tensors = to_theirs(architecture.table(self.config), self.params)
        if architecture.tied_bias is not None and not self.config.tied_embeddings:
            used, other = architecture.tied_bias
            tensors[other] = tensors[used]
        types = {str(tensor.dtype) for tensor in tensors.values()}
        config = {
            **self.theirs,
            **settings,
            "architectures": [architecture.name],
            "model_type": architecture.model_type,
            "dtype": types.pop() if len(types) == 1 else "float32",
        }
        write_folder(folder, config, tensors)


def load(folder: str | os.PathLike[str]) -> Pretrained:
    """Reads a Hugging Face folder: config.json, and one safetensors file or several.

    Parameters keep the type that they have there; the model computes in float32.

    Raises:
      OSError: if a file is missing.
      ValueError: if the architecture or one of its settings is not one that we have, or tensors are
        missing, damaged, of another size, or wanted by no parameter.
    """
    theirs = read_config(folder)
    try:
        architecture = of(theirs)
        config = architecture.config(theirs)
        tensors = read_tensors(folder)
        if architecture.poolerless is not None and not any("pooler" in name for name in tensors):
            architecture = architecture.poolerless
        tensors = named_alike(architecture, config, tensors)
        (dtype, _), *_ = collections.Counter(str(x.dtype) for x in tensors.values()).most_common()
        config = dataclasses.replace(config, param_dtype=dtype)
        module = architecture.module(config)
        params = to_ours(architecture.table(config), shapes(module, architecture), tensors)
    except KeyError as error:
        raise ValueError(f"{folder}: config.json has no setting {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return Pretrained(
        config=config, module=module, params=params, architecture=architecture, theirs=theirs
    )


def of(theirs: Settings) -> Architecture:
    """The architecture that a config.json names.

    Raises:
      ValueError: naming those there are, if it is not one of them.
    """
    model_type, names = theirs["model_type"], theirs.get("architectures") or []
    known = [one for one in ARCHITECTURES.values() if one.model_type == model_type]
    if not known:
        types = sorted({one.model_type for one in ARCHITECTURES.values()})
        raise ValueError(f"wanted a model type of {', '.join(types)}, got {model_type!r}")
    if not names:
        return known[0]
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    have = ", ".join(one.name for one in known)
    raise ValueError(f"wanted an architecture of {have}, got {', '.join(names)}")


def named_alike(
    architecture: Architecture, config: Any, tensors: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The tensors under the names of the architecture's table, without what is no parameter.

    Raises:
      ValueError: if what should be stored twice, as it is tied, differs.
    """
    prefix = architecture.prefix
    found = {name: x for name, x in tensors.items() if not name.endswith(architecture.ignored)}
    for old, new in architecture.renamed.items():
        for name in [name for name in found if name.endswith(old)]:
            found[name.removesuffix(old) + new] = found.pop(name)
    if not any(name.startswith(prefix) for name in found):
        found = {prefix + name: x for name, x in found.items()}
    for again, name in architecture.tied(config).items():
        for alias in dict.fromkeys((again, prefix + again)):
            other = found.pop(alias, None)
            if other is not None and not jnp.array_equal(other, found.setdefault(name, other)):
                raise ValueError(f"{again} and {name} are tied, and differ")
    if architecture.tied_bias is not None and not config.tied_embeddings:
        used, spare = architecture.tied_bias
        if spare in found:
            found.setdefault(used, found.pop(spare))
    return found


def shapes(module: nn.Module, architecture: Architecture) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Our parameters by their paths."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *architecture.example)
    return flatten_dict(meta.unbox(variables["params"]), sep="/")


def check_inputs(inputs: Mapping[str, np.ndarray], architecture: Architecture, config: Any) -> None:
    """Refuses inputs that would run, and give nonsense, or would not run.

    Raises:
      ValueError: naming the input.
    """
    parameters = list(inspect.signature(architecture.call).parameters.values())[2:]
    names = [one.name for one in parameters]
    for name in inputs:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1) or names
            raise ValueError(f"no input is called {name!r}; did you mean {', '.join(close)}?")
    for one in parameters:
        if one.default is one.empty and one.name not in inputs:
            raise ValueError(f"wanted {one.name}, got {', '.join(inputs) or 'nothing'}")
    for name, array in inputs.items():
        main = "decoder_input_ids" if name.startswith("decoder_") else names[0]
        if array.ndim != 2 and name == main:
            raise ValueError(f"wanted {name} of two axes, got shape {array.shape}")
        if array.shape != inputs[main].shape:
            raise ValueError(f"wanted {name} of shape {inputs[main].shape}, got {array.shape}")
    if len({len(array) for array in inputs.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
        raise ValueError(f"wanted inputs of as many rows each, got {shapes}")
    for name, limit in architecture.limits(config).items():
        ids = inputs.get(name)
        if ids is not None and ids.size and not (ids.min() >= 0 and ids.max() < limit):
            raise ValueError(f"wanted {name} in [0, {limit}), got {ids.min()} to {ids.max()}")
