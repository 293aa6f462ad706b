"""What commands have in common: how they read what was typed, and how they answer."""

import contextlib
import importlib
import io
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from lineage_jax import lineage

T = TypeVar("T")


EXIT_IO, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class UsageError(ValueError):
    """Something on the command line was not as wanted."""


def exit_code(error: BaseException) -> int:
    """That of a command which ends in that error."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, ValueError):
        return EXIT_USAGE
    return EXIT_IO  # divergence too, and the device's own errors, such as no memory left


def pick(kind: str, name: str, choices: dict[str, T], hint: str = "") -> T:
    """The choice of that name, or a `UsageError` that names the closest."""
    import difflib

    if name not in choices:
        close = difflib.get_close_matches(name, choices, n=2)
        meant = f"did you mean {' or '.join(close)}?" if close else f"have {', '.join(choices)}"
        raise UsageError(f"no {kind} is called {name!r}; {meant}{'; ' + hint if hint else ''}")
    return choices[name]


def options(kind: type[T], default: T, arguments: Sequence[str], program: str) -> T:
    """Reads a config from the command line; what it cannot read is a `UsageError` of one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(kind, default=default, args=list(arguments), prog=program)
    except SystemExit as stop:
        if not stop.code:
            print(said.getvalue(), end="")
            raise
    lines = [line.strip(" │╭╰─╮╯") for line in said.getvalue().splitlines()]
    noise = ("For full help", "Argument helptext", "(default", "---")
    told = [line for line in lines[1:] if line and not line.startswith(noise)]
    raise UsageError(f"{' '.join(told)} (`{program} --help` shows every option)")


def take_option(arguments: list[str], flag: str, default: str) -> str:
    """Takes `--flag VALUE` or `--flag=VALUE` out of the arguments."""
    for i, argument in enumerate(arguments):
        if argument == flag:
            if i + 1 == len(arguments):
                raise UsageError(f"{flag} wants a value")
            del arguments[i]
            return arguments.pop(i)
        if argument.startswith(f"{flag}="):
            return arguments.pop(i).split("=", 1)[1]
    return default


def without_prefix(kind: type) -> Any:
    """A field of that type whose own fields are options without the field's name before them."""
    import tyro

    return Annotated[kind, tyro.conf.arg(name="")]


def chosen_preset(program: str, arguments: Sequence[str]) -> tuple[str, str, Any, list[str]]:
    """Reads `NAME --preset PRESET`: both, that experiment, and the arguments that are left."""
    names = {one.name: one for one in lineage.LINEAGE}
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"wanted `lineage {program} NAME`, NAME one of {', '.join(names)}")
    name, rest = arguments[0], list(arguments[1:])
    pick("milestone", name, names, hint="`lineage list` shows them all")
    presets = importlib.import_module(f"experiments.{name}").PRESETS
    preset = take_option(rest, "--preset", next(iter(presets)))
    return name, preset, pick("preset", preset, presets)(), rest


def of_a_folder(program: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Reads `RUN_OR_FOLDER --option ...`: the folder, and the rest."""
    if list(arguments) == ["--help"]:
        return "RUN_OR_FOLDER", ["--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(
            f"wanted `lineage {program} FOLDER`, a run of `lineage train` or a Hugging Face folder"
        )
    return arguments[0], list(arguments[1:])


def of_a_fit(program: str, kind: type[T], arguments: Sequence[str]) -> tuple[str, T]:
    """Reads `FIT.json --flops C ...`: the fit's path, and the options."""
    if list(arguments) == ["--help"]:
        arguments = ["FIT.json", "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"wanted `lineage {program} FIT.json --flops 1e24`, a fit on disk")
    import tyro

    path, missing = arguments[0], tyro.MISSING_NONPROP
    return path, options(kind, missing, arguments[1:], f"lineage {program} {path}")


def say(line: str) -> None:
    """Prints a line that is wanted now: the next may take minutes."""
    print(line, flush=True)
