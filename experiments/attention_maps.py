"""Where a model looks: every head's map of attention, as a page or a figure."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from experiments import speaking
from experiments.converting import of_run
from experiments.saved import Saved, open_model
from experiments.translating import TranslateOptions, Translator, translate_lines
from lineage_jax.data.tokenizers import Tokenizer

PAGE = pathlib.Path(__file__).with_name("attention_maps.html")


@dataclasses.dataclass(frozen=True)
class Maps:
    """All heads of one kind of attention on one text.

    Attributes:
      name: of the kind, such as "decoder cross attention".
      queries: the tokens that look.
      keys: the tokens that are looked at.
      weights: [L, H, T, S]; each row sums to one, but for what a model masks.
    """

    name: str
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    weights: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """As the page has it: weights in thousandths."""
        thousandths = np.rint(1000 * self.weights).astype(int)
        return {**dataclasses.asdict(self), "weights": thousandths.tolist()}


def attention_maps(folder: str, text: str, target: str | None = None) -> list[Maps]:
    """What each head of a model looks at in a text.

    Args:
      folder: a run, or a Hugging Face folder with a tokenizer.
      text: to be read; of a translator, the source.
      target: of a translator, the translation; its own, if not given.

    Raises:
      OSError, ValueError: if the folder is neither, or the model has no attention to show.
    """
    opened = open_model(folder)
    config, params = speaking.config_and_params(opened)
    inputs: tuple[np.ndarray, ...]
    if type(config) in speaking.TRANSLATORS:
        translator = Translator.of(folder, opened)
        module, ids = translator.module, translator.source(text)
        if translator.reverse:
            ids = np.append(ids[-2::-1], ids[-1:])
        if target is None:
            target = next(iter(translate_lines(folder, [text], TranslateOptions(num_beams=1))))
        tokens = np.append([translator.start], translator.tokenizer.encode(target))
        sides = words(translator.source_tokenizer, ids), words(translator.tokenizer, tokens)
        inputs = ids, tokens
    else:
        tokenizer = speaking.text_tokenizer(folder, opened)
        if type(config) in speaking.LANGUAGE_MODELS:
            module = speaking.LANGUAGE_MODELS[type(config)][0](config)
            ids = np.append(speaking.first_token(opened, tokenizer), tokenizer.encode(text))
        elif type(config) in speaking.ENCODERS:
            found = of_run(opened) if isinstance(opened, Saved) else opened
            module, params, ids = found.module, found.params, tokenizer.encode(text)
        else:
            raise ValueError(f"{folder}: a {type(config).__name__} is not shown")
        inputs, sides = (ids,), (words(tokenizer, ids),) * 2
    rows = [jnp.asarray(one, jnp.int32)[None] for one in inputs]
    look = jax.jit(functools.partial(module.apply, mutable=["intermediates"]))
    _, seen = look({"params": params}, *rows)
    maps = [
        named(path, np.asarray(value[0]), *sides)
        for path, value in flatten_dict(seen["intermediates"]).items()
        if path[-1] in ("weights", "alignment")
    ]
    if not maps:
        raise ValueError(f"{folder}: a {type(config).__name__} has no attention to be seen")
    return sorted(maps, key=lambda one: one.queries == one.keys)  # from side to side first


def named(
    path: tuple[str, ...], weights: np.ndarray, source: tuple[str, ...], target: tuple[str, ...]
) -> Maps:
    """Maps of what a module gave, whose path tells which side looks at which."""
    if path[-1] == "alignment":  # B T S, of a recurrence
        return Maps("alignment", target, source, weights[0][None, None])
    weights = weights[:, 0]  # L H T S
    name = " ".join(part for part in path[:-1] if part not in ("blocks", "block"))
    looks = source if path[0] == "encoder" else target
    keys = source if "cross_attention" in path else looks
    return Maps(name.replace("_", " "), looks, keys, weights)


def words(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """Each token as it is written; the end of a text, which is not, as a sign."""
    return tuple(tokenizer.decode([one]) or "\N{END OF PROOF}" for one in np.asarray(ids).tolist())


def page(maps: Sequence[Maps], title: str) -> str:
    """One HTML page, which needs no network."""
    told = json.dumps({"title": title, "maps": [one.to_json() for one in maps]})
    return PAGE.read_text().replace("/*DATA*/null", told.replace("</", "<\\/"))


def figure(maps: Maps, layer: int = 0) -> Any:
    """The heads of one layer as a matplotlib figure, for a notebook."""
    from matplotlib.figure import Figure

    heads = maps.weights[layer]
    width = min(4, len(heads))
    height = -(-len(heads) // width)
    made = Figure(figsize=(3.2 * width, 3.2 * height), layout="constrained")
    for number, (axes, weights) in enumerate(
        zip(made.subplots(height, width, squeeze=False).flat, heads, strict=False)
    ):
        axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(maps.keys)), maps.keys, rotation=90)
        axes.set_yticks(range(len(maps.queries)), maps.queries)
        axes.set_title(f"layer {layer + 1}, head {number + 1}")
    return made
