"""How good a trained model is: on what its run kept from training, on text, or on a task."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from experiments import language, speaking, translating
from experiments.few_shot import Model, Normalise, few_shot
from experiments.saved import Saved, open_model
from lineage_jax import sharding
from lineage_jax.data.labelled import LabelledData
from lineage_jax.data.packing import Batches
from lineage_jax.data.pairs import PairsData, load_pairs
from lineage_jax.data.parallel_text import read_parallel_text
from lineage_jax.data.sources import read_text
from lineage_jax.data.tokens import tokenize
from lineage_jax.pretrained import Pretrained
from lineage_jax.train.loop import evaluate as evaluate_task

SEQ_LEN = 1024
"""Tokens in a row of text that is given, at most: GPT-2's context (Radford et al. 2019, 2.3)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What a model is evaluated on."""

    path: str | None = None
    """Of a language model: text (.txt, .md, .py, .jsonl, any of them .gz, or a folder of them)."""
    source_path: str | None = None
    """Of a translator: sentences, one a line."""
    target_path: str | None = None
    """Their translations, line by line."""
    few_shot: str | None = None
    """Of a language model: a task, a .jsonl of {"prompt", "answer"}, which is to be written, or of
    {"prompt", "choices", "answer": index}, one of which is to be chosen."""
    shots: str = "0,1,5"
    """How many other examples of the task stand in the context: one number, or several."""
    normalise: Normalise = "tokens"
    """How a task's choices are compared, whatever their length (`experiments.few_shot`)."""
    seed: int = 0
    """Of the draw of examples."""
    batch_size: int = 8
    """Rows at a time of text that is given, and of a task."""
    num_beams: int = 4
    """Of translations (Vaswani et al. 2017, section 6.1), and of a task's answers (Brown et al.
    2020, section 2.4)."""
    alpha: float = 0.6
    """Of the penalty on short ones (the same sections)."""

    def __post_init__(self):
        if (self.source_path is None) != (self.target_path is None):
            raise ValueError("wanted --source-path and --target-path, came one of them")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.path is not None and self.few_shot is not None:
            raise ValueError("wanted --path or --few-shot, came both")
        self.num_shots  # noqa: B018, refuses what are no numbers before anything is read

    @property
    def num_shots(self) -> tuple[int, ...]:
        """The numbers of `shots`."""
        parts = self.shots.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"wanted --shots as in 0,1,5, came {self.shots!r}")
        return tuple(map(int, parts))


def evaluate(
    folder: str, options: EvaluateOptions, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Numbers by name, of a run or of a Hugging Face folder.

    Of a language model: loss (nats a token), perplexity, accuracy and, where the text is known,
    bits per byte; of a task, how much of it is right by the number of examples shown. Of a
    classifier: loss (nats a text) and accuracy. Of a translator, BLEU and chrF by sacrebleu. Of a
    run on its own held-out data, all that its evaluations hold, besides.

    Args:
      folder: which.
      options: on what.
      say: is told what takes a while.

    Raises:
      OSError, ValueError: if the folder is neither, or there is nothing to evaluate it on.
    """
    opened = open_model(folder)
    config, _ = speaking.config_and_params(opened)
    translates = type(config) in speaking.TRANSLATORS
    if options.path is not None or options.few_shot is not None:
        if type(config) not in speaking.LANGUAGE_MODELS:
            raise speaking.no_language_model(folder, opened)
        if options.path is not None:
            return on_text(folder, opened, options)
        return on_task(folder, opened, options)
    if options.source_path is not None and options.target_path is not None:
        if not translates:
            raise ValueError(f"{folder}: wanted a translator, got {type(config).__name__}")
        pairs = read_parallel_text(options.source_path, options.target_path)
        sides = [[document.text for document in side.documents] for side in pairs]
        return translated(folder, zip(*sides, strict=True), options, say)
    if isinstance(opened, Pretrained):
        raise ValueError(
            f"{folder}: wanted --path, --few-shot, or --source-path and --target-path, to evaluate "
            "it on"
        )
    found = on_its_own(opened)
    if isinstance(opened.experiment.data, PairsData):
        kept = load_pairs(opened.experiment.data).heldout_pairs
        found |= translated(folder, kept, options, say)
    return found


def on_its_own(run: Saved) -> dict[str, float]:
    """What the run's own evaluation says of its parameters."""
    experiment = run.experiment
    task = experiment.task()
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    state: Any = task.program.initial_state(mesh, 0)
    feed, step = sharding.Feed(task.program.batch, mesh), task.program.eval_step(mesh)
    with sharding.use(mesh):
        state = state.replace(params=run.params, extra=run.extra)
        found = evaluate_task(step, state, task, feed)
    assert found is not None
    return found if isinstance(experiment.data, LabelledData) else with_perplexity(found)


def on_text(folder: str, opened: Saved | Pretrained, options: EvaluateOptions) -> dict[str, float]:
    """A language model on text: every document from its start, in rows that do not overlap."""
    config, params = speaking.config_and_params(opened)
    module = speaking.LANGUAGE_MODELS[type(config)][0](config)
    tokenizer = speaking.text_tokenizer(folder, opened)
    assert options.path is not None
    stream = tokenize(read_text(options.path).documents, tokenizer)
    rows = Batches(
        stream,
        batch_size=options.batch_size,
        seq_len=min(config.max_len, SEQ_LEN),
        shuffle=False,
    )
    loss_fn = language.loss_fn(module, train=False)
    step = jax.jit(lambda params, batch: loss_fn(params, {}, batch, jax.random.key(0))[1][1])
    sums: dict[str, np.ndarray] = {}
    for number in range(rows.num_batches):
        for name, pair in step(params, rows(number)).items():
            sums[name] = sums.get(name, 0.0) + np.asarray(pair, np.float64)
    means = {name: float(total / max(count, 1.0)) for name, (total, count) in sums.items()}
    known = None if stream.num_bytes is None else stream.num_bytes / stream.num_targets
    return with_perplexity(language.with_bits_per_byte(means, known))


def on_task(folder: str, opened: Saved | Pretrained, options: EvaluateOptions) -> dict[str, float]:
    """A language model on a task that it is shown examples of."""
    assert options.few_shot is not None
    return few_shot(
        Model.of(folder, opened, options.batch_size),
        options.few_shot,
        options.num_shots,
        normalise=options.normalise,
        num_beams=options.num_beams,
        alpha=options.alpha,
        seed=options.seed,
    )


def with_perplexity(means: Mapping[str, float]) -> dict[str, float]:
    """The means, and e to the loss."""
    return {**means, "perplexity": math.exp(min(means["loss"], 700.0))}


def translated(
    folder: str,
    pairs: Iterable[tuple[str, str]],
    options: EvaluateOptions,
    say: Callable[[str], None],
) -> dict[str, float]:
    """BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of a translator, 0 to 100.

    Raises:
      ImportError: if sacrebleu is not there.
    """
    sacrebleu = import_sacrebleu()
    sources, references = zip(*pairs, strict=True)
    how = translating.TranslateOptions(num_beams=options.num_beams, alpha=options.alpha)
    say(f"translating {len(sources)} sentences")
    written = list(translating.translate_lines(folder, sources, how))
    return {
        "bleu": sacrebleu.corpus_bleu(written, [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(written, [list(references)]).score,
    }


def import_sacrebleu() -> Any:
    """The package that counts BLEU and chrF.

    Raises:
      ImportError: if it is not there.
    """
    try:
        import sacrebleu
    except ImportError:
        raise ImportError(
            "BLEU needs the `sacrebleu` package: pip install 'lineage-jax[evaluate]'"
        ) from None
    return sacrebleu
