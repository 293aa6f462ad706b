"""Finds the run that a fit suggests: model, tokens, batch, slice and mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.launch.answer import Launch
from experiments.launch.options import LaunchOptions
from experiments.launch.sizes import FAMILIES
from experiments.launch.slices import in_time, slices, smallest
from lineage_jax.pods import CHIPS, Topology
from lineage_jax.train.metrics import write_json
from scaling.allocation import Optimal
from scaling.commands import allocated
from scaling.fit import Fit, read_fit
from scaling.plan import batch_rule, rate_rule
from scaling.study import quantity

WARMUP = 20
"""Steps of a run to one of its warm-up, at the least, as in `scaling.plan`."""


def launch_file(path: str, options: LaunchOptions, say: Callable[[str], None]) -> list[str]:
    """What `lineage launch` says of a fit on disk, as lines for the terminal.

    Raises:
      ValueError: the file is no fit, or nothing that was asked for can be trained.
      ImportError: libtpu is not installed.
      OSError: the fit cannot be read.
    """
    made = launch(path, options, say)
    lines = ["", *made.lines()]
    if options.json:
        write_json(options.json, made.to_json())
        lines.append(f"Written to {options.json}")
    return [*lines, *(f"Warning: {text}" for text in made.warnings)]


def launch(path: str, options: LaunchOptions, say: Callable[[str], None]) -> Launch:
    """Finds the model, the tokens, the slice and the mesh; as `launch_file`."""
    fitted = read_fit(path, options.law)
    best = allocated(fitted, options, options.inference_tokens)
    experiment, params, tokens = sized(fitted, best, options)
    if options.topology is not None:
        choices = [Topology.parse(options.topology)]
    else:
        choices = slices(CHIPS[str(options.chip)], params)
    if options.days is None:
        chosen = smallest(experiment, choices, float(tokens), say)
    else:
        chosen = in_time(experiment, choices, float(tokens), options.days, say)
    interval = options.interval if fitted.draws else None
    loss = fitted.predict(params=params, tokens=tokens, interval=interval)
    return Launch(
        path=path,
        options=options,
        fitted=fitted,
        best=best,
        params=params,
        tokens=tokens,
        loss=loss,
        chosen=chosen,
    )


def sized(fitted: Fit, best: Optimal, options: LaunchOptions) -> tuple[Any, int, int]:
    """The experiment of a real shape for N*, its parameters, and tokens for the same compute."""
    family = FAMILIES[options.experiment]
    experiment = family.experiment(
        float(best.params),
        count=options.count,
        seq_len=options.seq_len,
        vocab_size=options.vocab_size,
    )
    params = family.num_params(experiment.model)[options.count]
    k, p = fitted.cost
    flops, seq_len = float(best.flops), experiment.data.seq_len
    wanted = flops / (k * params**p)
    batch_tokens = options.batch_tokens or batch_rule(flops, seq_len, wanted)
    if batch_tokens % seq_len:
        raise ValueError(
            f"--batch-tokens: wanted a multiple of the {seq_len} tokens of a row, got "
            f"{batch_tokens}"
        )
    num_steps = round(wanted / batch_tokens)
    if num_steps < 1:
        raise ValueError(f"{quantity(wanted)} tokens are less than a step of {batch_tokens:,}")
    optimizer = experiment.optimizer
    experiment = dataclasses.replace(
        experiment,
        data=dataclasses.replace(
            experiment.data, path=options.data_path, batch_size=batch_tokens // seq_len
        ),
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate=float(f"{rate_rule(flops, batch_tokens):.2g}"),
            warmup_steps=min(optimizer.warmup_steps, num_steps // WARMUP),
        ),
        train=dataclasses.replace(experiment.train, num_steps=num_steps),
    )
    return experiment, params, num_steps * batch_tokens
