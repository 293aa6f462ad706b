"""Commands about one trained model: a run of ours, or a Hugging Face folder."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from lineage_jax.cli.terminal import UsageError, of_a_folder, options, say, without_prefix


def generate(arguments: Sequence[str]) -> None:
    """`lineage generate RUN_OR_FOLDER --prompt TEXT`: what a language model says."""
    folder, rest = of_a_folder("generate", arguments)
    from experiments.speaking import GenerateOptions, generate_text
    from lineage_jax.train.compilation import compilation_cache

    program = f"lineage generate {folder}"
    chosen = options(GenerateOptions, GenerateOptions(), rest, program)
    with compilation_cache():
        for piece in generate_text(folder, chosen):
            print(piece, end="", flush=True)
    print()


def translate(arguments: Sequence[str]) -> None:
    """`lineage translate RUN_OR_FOLDER --text SENTENCE`: a translator at work."""
    folder, rest = of_a_folder("translate", arguments)
    from experiments.translating import TranslateOptions, translate_lines
    from lineage_jax.train.compilation import compilation_cache

    program = f"lineage translate {folder}"
    chosen = options(TranslateOptions, TranslateOptions(), rest, program)
    sentences = list(chosen.text) or [line.rstrip("\n") for line in sys.stdin]
    with compilation_cache():
        for line in translate_lines(folder, sentences, chosen):
            say(line)


def evaluate(arguments: Sequence[str]) -> None:
    """`lineage evaluate RUN_OR_FOLDER`: how good a model is."""
    folder, rest = of_a_folder("evaluate", arguments)
    from experiments.evaluation import EvaluateOptions
    from experiments.evaluation import evaluate as evaluated
    from lineage_jax.train.compilation import compilation_cache

    @dataclasses.dataclass(frozen=True)
    class Options:
        on: without_prefix(EvaluateOptions) = dataclasses.field(default_factory=EvaluateOptions)
        json: bool = False
        """As JSON, on one line."""

    chosen = options(Options, Options(), rest, f"lineage evaluate {folder}")
    with compilation_cache():
        found = evaluated(folder, chosen.on, lambda line: print(line, file=sys.stderr))
    if chosen.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:20} {value:.4f}")


def convert(arguments: Sequence[str]) -> None:
    """`lineage convert RUN_OR_FOLDER FOLDER`: weights for Hugging Face's library."""
    if len(arguments) != 2 or arguments[0].startswith("-"):
        raise UsageError("wanted `lineage convert RUN_OR_FOLDER FOLDER`")
    from experiments.converting import convert as converted

    print(converted(*arguments))


def fill(arguments: Sequence[str]) -> None:
    """`lineage fill RUN_OR_FOLDER --text "the ___ sat"`: what stands in the blanks."""
    folder, rest = of_a_folder("fill", arguments)
    import tyro

    from experiments.filling import FillOptions
    from experiments.filling import fill as filled
    from lineage_jax.train.compilation import compilation_cache

    missing: Any = tyro.MISSING_NONPROP
    chosen = options(FillOptions, missing, rest, f"lineage fill {folder}")
    with compilation_cache():
        print("\n".join(filled(folder, chosen)))


def average(arguments: Sequence[str]) -> None:
    """`lineage average RUN --last 5`: the mean of a run's last checkpoints, as a run."""
    folder, rest = of_a_folder("average", arguments)
    from experiments.averaging import AverageOptions, average_run

    chosen = options(AverageOptions, AverageOptions(), rest, f"lineage average {folder}")
    print(average_run(folder, chosen))


def attention(arguments: Sequence[str]) -> None:
    """`lineage attention RUN_OR_FOLDER --text TEXT --out attention.html`: where each head looks."""
    folder, rest = of_a_folder("attention", arguments)

    @dataclasses.dataclass(frozen=True)
    class Options:
        text: str
        """To be read; of a translator, the source."""
        target: str | None = None
        """Of a translator, the translation; its own, if not given."""
        out: str = "attention.html"
        """The page to write."""

    import tyro

    missing: Any = tyro.MISSING_NONPROP
    chosen = options(Options, missing, rest, f"lineage attention {folder}")
    from experiments.attention_maps import attention_maps, page
    from lineage_jax.train.compilation import compilation_cache

    with compilation_cache():
        maps = attention_maps(folder, chosen.text, chosen.target)
    pathlib.Path(chosen.out).write_text(page(maps, f"{folder}: {chosen.text}"))
    heads = sum(one.weights.shape[0] * one.weights.shape[1] for one in maps)
    print(f"{chosen.out}: {heads} heads")
