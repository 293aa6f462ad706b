"""A Hugging Face folder: config.json, and tensors in one safetensors file or several."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

SHARD_BYTES = 5 * 10**9
"""Most that a file holds: what `transformers` split files at for years."""


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What config.json says.

    Raises:
      OSError: if there is none.
      ValueError: if it is not JSON, or names no `model_type`.
    """
    path = pathlib.Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: wanted a folder with a {CONFIG} in it, found none")
    config = read_json(path)
    if "model_type" not in config:
        raise ValueError(f"{path}: wanted a `model_type`, found none")
    return config


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, jax.Array]:
    """All tensors of the folder by name, each in its own type.

    Raises:
      OSError: if a file is missing.
      ValueError: if one is damaged, or lacks a tensor that the index promises.
    """
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    folder = pathlib.Path(folder)
    promised: dict[str, str] = {}
    if (folder / INDEX).is_file():
        promised = read_json(folder / INDEX).get("weight_map", {})
    elif not (folder / WHOLE).is_file():
        other = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" (of {other[0]}, `save_pretrained` of transformers makes one)" if other else ""
        raise FileNotFoundError(f"{folder}: wanted {WHOLE} or {INDEX}, found neither{hint}")
    tensors: dict[str, jax.Array] = {}
    for name in sorted(set(promised.values())) or [WHOLE]:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: named by {INDEX}, and not there")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or cut short ({error})") from error
    for name, file in promised.items():
        if name not in tensors:
            raise ValueError(f"{folder / file}: {INDEX} promises {name}, and it is not there")
    return tensors


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, jax.Array],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and the tensors, in files of at most `shard_bytes` where one allows.

    Raises:
      FileExistsError: if the folder holds a model already.
    """
    from safetensors.flax import save_file

    folder = pathlib.Path(folder)
    for name in (CONFIG, WHOLE, INDEX):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} is there already; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, jax.Array]] = [{}]
    room = shard_bytes
    for name, tensor in sorted(tensors.items()):
        if files[-1] and tensor.nbytes > room:
            files.append({})
            room = shard_bytes
        files[-1][name] = tensor
        room -= tensor.nbytes
    count = len(files)
    for i, file in enumerate(files):
        name = WHOLE if count == 1 else shard_name(i, count)
        save_file(file, folder / name, {"format": "pt"})
    if count > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: shard_name(i, count) for i in range(count) for name in files[i]},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def shard_name(i: int, count: int) -> str:
    """Of file i of several."""
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: if the file is none.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted a JSON object, found {type(found).__name__}")
    return found
