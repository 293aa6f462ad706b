"""The command line: `lineage train`, `lineage sweep`, `lineage fit`, `lineage list`, ...

Thin: each command reads its options, calls one function and prints what came back. Heavy imports
wait until a command needs them, so that `lineage --help` answers at once.
"""

import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from lineage_jax.cli import milestones, models, scaling, training
from lineage_jax.cli.terminal import exit_code, pick

USAGE = """\
lineage: the lineage of modern AI in JAX, and its scaling laws

  lineage list                      the milestones, as a table
  lineage show gpt                  one milestone: its paper, its parents, its files
  lineage diff gpt llama            what a child changed: settings, parameters, cost
  lineage train gpt --preset tiny   train one (every setting is an option: add --help)
  lineage generate runs/gpt-tiny --prompt "Once"    what a model says; a Hugging Face folder too
  lineage translate runs/transformer-tiny           the lines of standard input, translated
  lineage fill runs/bert-tiny --text "for i ___ x:"  what stands in the blanks
  lineage evaluate runs/transformer-tiny            perplexity, bits per byte, BLEU
  lineage evaluate runs/gpt-tiny --few-shot t.jsonl a task, with examples of it in the context
  lineage average runs/transformer-tiny             the mean of its last checkpoints, as a run
  lineage convert runs/gpt-tiny folder              weights for Hugging Face's library
  lineage attention runs/gpt-tiny --text "Once"     where each head looks, as a page
  lineage runs                      the runs in a folder: which are under way, which went wrong
  lineage claim bahdanau            measure what its paper is known for (--quick: only that it runs)
  lineage claims --table            what was measured so far
  lineage plan gpt --preset gpt3_175b --topology v5p:8x8x8   what a slice you do not have would do
  lineage tokenizer train --model bpe --path book.txt   a tokenizer of your own text
  lineage sweep laptop              train many sizes, fit the scaling laws, write a report
  lineage plan-sweep --flops-min 1e15 --flops-max 1e18   a sweep of yours: sizes, time, cost
  lineage fit RUNS.csv              fit the scaling laws to anybody's runs
  lineage optimal FIT.json --flops 1e21   the best model and tokens for some compute
  lineage launch FIT.json --flops 1e24 --chip v5p   the same as a run: shape, slice, days, cost

Add --help to any command for its options, and --debug to see where an error came from.
Start with `lineage train gpt --preset tiny` (minutes) or `lineage sweep laptop` (a quarter of an
hour).
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. An error that a caller can mend is one line, exit code 2, or 1 for I/O."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    try:
        with contextlib.nullcontext() if debug else silent_libraries():
            command(arguments[0])(arguments[1:])
    except KeyboardInterrupt as stop:
        fail("stopped; run the same command again to go on", exit_code(stop))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        report(error, debug, exit_code(error))


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """Keeps threads of libraries from logging an error that is raised, and told in one line."""
    hooks = threading.excepthook, sys.unraisablehook, sys.excepthook
    logging.disable(logging.CRITICAL)
    threading.excepthook = lambda arguments: None
    sys.unraisablehook = lambda arguments: None
    sys.excepthook = lambda *arguments: None  # what a callback from C raises comes here
    try:
        yield
    except BaseException:  # asyncio logs what failed with it when that is collected: later
        logging.getLogger("asyncio").disabled = True
        raise
    finally:
        logging.disable(logging.NOTSET)
        threading.excepthook, sys.unraisablehook, sys.excepthook = hooks


def command(name: str) -> Callable[[list[str]], None]:
    """The function behind a command's name."""
    commands = {
        "list": milestones.list_,
        "show": milestones.show,
        "diff": milestones.diff,
        "train": training.train,
        "generate": models.generate,
        "translate": models.translate,
        "fill": models.fill,
        "evaluate": models.evaluate,
        "average": models.average,
        "convert": models.convert,
        "attention": models.attention,
        "runs": training.runs,
        "claim": milestones.claim,
        "claims": milestones.claims,
        "plan": training.plan,
        "sweep": scaling.sweep,
        "plan-sweep": scaling.plan_sweep,
        "tokenizer": training.tokenizer,
        "fit": scaling.fit,
        "optimal": scaling.optimal,
        "launch": scaling.launch,
    }
    return pick("command", name, commands, hint="`lineage --help` shows them all")


def report(error: Exception, debug: bool, code: int) -> NoReturn:
    """One line of an error, or all of it under --debug."""
    if debug:
        traceback.print_exception(error)
    text = str(error).strip() or type(error).__name__
    fail(" ".join(text.split()) if len(text) < 500 else text.splitlines()[0], code)


def fail(line: str, code: int) -> NoReturn:
    print(f"lineage: {line}", file=sys.stderr)
    raise SystemExit(code)
