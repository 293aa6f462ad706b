"""The loop around the step: data in, metrics out, checkpoints, evaluation, samples, signals."""

import contextlib
import dataclasses
import errno
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lineage_jax import sharding
from lineage_jax.sharding import Feed
from lineage_jax.train import memory, runs
from lineage_jax.train.checkpoint import Checkpoints
from lineage_jax.train.metrics import (
    JsonLines,
    Writer,
    config_json,
    environment,
    peak_flops,
    write_json,
)
from lineage_jax.train.processes import Interruption
from lineage_jax.train.program import Program
from lineage_jax.train.progress import Progress
from lineage_jax.train.state import TrainState
from lineage_jax.train.watch import Watch
from lineage_jax.typing import Params, PRNGKeyArray

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and what to write down on the way."""

    num_steps: int = 1000
    seed: int = 0
    accumulate: int = 1
    """Micro-batches that a batch is computed in, to save memory."""
    steps_per_call: int | None = None
    """Steps that one call of the compiled program takes if nothing is due between them; a signal
    waits for them. Not given: 5 on CPU, where each call maps its memory anew, 1 elsewhere."""
    log_every: int = 10
    """Steps between two fetches of the metrics; every step's line is written all the same."""
    eval_every: int = 250
    """Steps between two evaluations; one more at the end."""
    checkpoint_every: int = 250
    """Steps between two checkpoints; one more at the end."""
    keep_checkpoints: int = 3
    max_skipped: int = 10
    """Steps in a row whose gradient is not finite after which training stops."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl (the extra `track`)."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("seed", "track") and value is not None and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.keep_checkpoints < 2:
            raise ValueError(
                f"keep_checkpoints must be at least 2, got {self.keep_checkpoints}: a run that is "
                "killed while it saves goes on from the one before"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What an experiment hands to the loop: everything that depends on the milestone.

    Attributes:
      name: of the experiment.
      program: what is compiled.
      learning_rate: of each step, from 0.
      train_batch: the given rows of the global batch of a step.
      eval_batches: the given rows of each evaluation batch, in turn.
      summarise: adds what follows from an evaluation's means (bits per byte from the loss).
      sample: from parameters and a key, text to look at, or None.
      first_state: puts what was learnt before into a state that is new, or None.
      after_evaluation: what an evaluation's means change of the state, or None. A run that resumes
        at an evaluated step calls it again, of which the state it returns must know.
      data_seed: what `train_batch` depends on besides the step.
      provenance: what the record of a run says of its data; plain JSON types.
    """

    name: str
    program: Program
    learning_rate: Callable[[int], float]
    train_batch: Callable[[int, np.ndarray], Mapping[str, np.ndarray]]
    eval_batches: Callable[[np.ndarray], Iterable[Mapping[str, np.ndarray]]]
    summarise: Callable[[dict[str, float]], dict[str, float]] = lambda means: means
    sample: Callable[[Params, PRNGKeyArray], str] | None = None
    first_state: Callable[[TrainState], TrainState] | None = None
    after_evaluation: Callable[[TrainState, Mapping[str, float]], TrainState] | None = None
    data_seed: int = 0
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def evaluate(
    eval_step: Callable,
    state: TrainState,
    task: Task,
    feed: Feed,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means of the metrics over every evaluation batch, weighted by their counts.

    None if, before a batch or after the last, `interrupted` says so.
    """
    sums: dict[str, np.ndarray] = {}
    for batch in task.eval_batches(feed.rows):
        if interrupted():
            return None
        metrics = eval_step(state, feed(batch))
        for name, pair in jax.device_get(metrics).items():
            sums[name] = sums.get(name, 0.0) + np.asarray(pair, np.float64)
    if interrupted():
        return None
    means = {name: float(total / max(count, 1.0)) for name, (total, count) in sums.items()}
    return task.summarise(means)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: its last state and its last evaluation."""

    state: TrainState
    evaluation: dict[str, float]


def train(
    task: Task,
    config: TrainConfig,
    mesh: Mesh,
    folder: epath.PathLike,
    *,
    experiment: Any = None,
    progress: Progress,
    writers: Sequence[Writer] = (),
    watch: Watch | None = None,
) -> Result:
    """Trains from the latest intact checkpoint in `folder`, or from the start.

    A run that is killed and called again gives the same losses, bit for bit, as one that is not.

    Args:
      task: what to train.
      config: how long.
      mesh: the devices.
      folder: the run directory (local or gs://).
      experiment: the config tree to record in config.json.
      progress: what a person sees.
      writers: receive every step's scalars besides metrics.jsonl.
      watch: is told of the run, to write down if another process is gone.

    Raises:
      DivergedError: after `max_skipped` steps in a row that were not finite; the state is saved.
      SystemExit: with code 75 after SIGTERM, everything saved.
      ValueError: if a step does not fit in the devices' memory.
      OSError: if a checkpoint or the metrics cannot be written.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    task.program.train_steps(mesh, accumulate=config.accumulate)  # refuses what does not divide
    with (
        Interruption() as interruption,
        Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints) as checkpoints,
    ):
        restored = checkpoints.restore_latest(task.program.abstract_state(mesh))
        if restored:
            step, state, problems = restored
            for problem in problems:
                progress.say(f"passed over: {problem}")
            progress.say(f"resumed from step {step}")
        else:
            state = task.program.initial_state(mesh, config.seed)
            if task.first_state is not None:
                state = task.first_state(state)
        run = None
        try:
            run = Run(
                task, config, mesh, folder, state, checkpoints, interruption, progress, writers
            )
            if watch is not None:
                watch.run = run
            if jax.process_index() == 0:
                write_json(folder / "config.json", config_json(experiment) if experiment else {})
                told = {"milestone": task.name, "data": dict(task.provenance)}
                write_json(folder / "env.json", {**environment(), **told})
            return run.to_the_end()
        except BaseException as error:
            if run is not None:
                with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
                    run.close(error)
            if isinstance(error, OSError) and error.errno in FULL:
                raise checkpoints.failed_to_save(error) from error
            raise


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How a system says that there is no room: on the disk, for this user, in one file."""

MAY_CHANGE = ("mesh", "train")
"""Parts of a config that a resumed run may change: where and how long it runs."""


def check_run_dir(folder: epath.PathLike, experiment: Any, resume: bool) -> None:
    """Refuses to write over another run, or to resume one with another config.

    Raises:
      ValueError: naming the settings that differ.
    """
    recorded = epath.Path(folder) / "config.json"
    if not recorded.exists():
        return
    if not resume:
        raise ValueError(
            f"{folder} holds a run already; add --resume to go on with it, or choose another "
            "--run-dir"
        )
    old, new = (
        settings(one) for one in (json.loads(recorded.read_text()), config_json(experiment))
    )
    for name, value in new.items():
        if old.get(name) != value:
            raise ValueError(
                f"cannot resume {folder}: {name} was {old.get(name)!r}, now {value!r}; give the "
                "settings it began with, or another --run-dir"
            )


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run may not change, with a dot between a part and its setting."""
    found: dict[str, Any] = {}
    for part in config.keys() - set(MAY_CHANGE):
        value = config[part]
        one = {f"{part}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {}
        found |= one or {part: value}
    return found


class Run:
    """One run under way: what `train` keeps between two steps."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        mesh: Mesh,
        folder: epath.Path,
        state: TrainState,
        checkpoints: Checkpoints,
        interruption: Interruption,
        progress: Progress,
        writers: Sequence[Writer],
    ):
        self.task, self.config, self.mesh, self.folder = task, config, mesh, folder
        self.state, self.checkpoints = state, checkpoints
        self.interruption, self.progress = interruption, progress
        self.step = int(state.step)
        self.skipped_in_a_row = int(state.skipped)
        self.saved_step = self.step if self.step else None
        self.pending: list[tuple[range, Any]] = []
        mine = jax.process_index() == 0
        self.metrics = JsonLines(folder / "metrics.jsonl", self.step, write=mine)
        self.loss: float | None = self.metrics.last.get("loss")
        self.evaluation = {  # of the step that it resumes from, unless that was interrupted
            name.removeprefix("eval_"): value
            for name, value in self.metrics.last.items()
            if name.startswith("eval_")
        }
        self.writers: list[Writer] = [self.metrics, *writers]
        self.feed = Feed(task.program.batch, mesh)
        self.train_steps = task.program.train_steps(mesh, accumulate=config.accumulate)
        self.programs: dict[tuple[tuple[int, ...], ...], Any] = {}
        self.eval_step = task.program.eval_step(mesh)
        device = mesh.devices.flat[0]
        self.steps_per_call = config.steps_per_call or (5 if device.platform == "cpu" else 1)
        self.peak, self.peak_source = peak_flops(device)

    def to_the_end(self) -> Result:
        """Steps until num_steps, a signal or an error."""
        config, bar = self.config, self.progress.add(self.task.name, self.config.num_steps)
        self.status("running")
        since, first, speed = time.perf_counter(), self.step, ""
        with sharding.use(self.mesh):
            if self.step and self.due(config.eval_every):
                if self.evaluation:
                    self.heed()
                else:
                    self.evaluate()
            while self.step < config.num_steps:
                steps, batches, rates = self.next_call()
                if shapes(batches) not in self.programs:
                    self.compile(len(steps), batches, rates)
                    since, first = time.perf_counter(), self.step
                if self.interruption.asked():
                    self.leave()
                self.advance(steps, batches, rates)
                if self.due(config.log_every):
                    self.fetch()
                    now = time.perf_counter()
                    if self.step > first:
                        speed = self.speed((self.step - first) / (now - since))
                    since, first = now, self.step
                    shown = "" if self.loss is None else f"loss {self.loss:.4f}  "
                    self.progress.update(bar, self.step, shown + speed)
                if self.due(config.eval_every):
                    self.evaluate()
                    since, first = time.perf_counter(), self.step
                if self.due(config.checkpoint_every):
                    self.save()
        self.close(None)
        return Result(self.state, self.evaluation)

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step >= self.config.num_steps

    def next_call(self) -> tuple[range, Mapping[str, jax.Array], np.ndarray]:
        """The steps of the next call of the compiled program, their batches and learning rates."""
        config, task = self.config, self.task
        every = (config.log_every, config.eval_every, config.checkpoint_every)
        left = min(config.num_steps - self.step, *(n - self.step % n for n in every))
        # All or one, so that there are at most two programs to compile for each shape of a batch.
        num_steps = self.steps_per_call if left >= self.steps_per_call else 1
        steps = range(self.step, self.step + num_steps)
        rows = [task.train_batch(step, self.feed.rows) for step in steps]
        if len({shapes(batch) for batch in rows}) > 1:
            steps, rows = steps[:1], rows[:1]
        stacked = {name: np.stack([batch[name] for batch in rows]) for name in rows[0]}
        rates = np.array([task.learning_rate(step) for step in steps], np.float32)
        return steps, self.feed.stack(stacked), rates

    def compile(self, num_steps: int, batches: Mapping[str, jax.Array], rates: np.ndarray) -> None:
        """Makes the program of that many steps, unless it would not fit in memory."""
        self.progress.say(f"compiling {num_steps} step{'s' if num_steps > 1 else ''} a call")
        lowered = self.train_steps.lower(self.state, batches, rates)
        limit = memory.available(self.mesh.local_devices[0])
        self.programs[shapes(batches)] = memory.compile_within(lowered, limit)

    def advance(self, steps: range, batches: Mapping[str, jax.Array], rates: np.ndarray) -> None:
        """The steps of one call; their metrics stay on the device."""
        self.state, metrics = self.programs[shapes(batches)](self.state, batches, rates)
        self.step = steps.stop
        self.pending.append((steps, {**metrics, "learning_rate": (rates, np.ones(len(rates)))}))

    def fetch(self) -> None:
        """Writes down the metrics of the steps since the last fetch."""
        fetched = [
            (index + 1, jax.tree.map(lambda value, i=i: value[i], metrics))
            for steps, metrics in jax.device_get(self.pending)
            for i, index in enumerate(steps)
        ]
        self.pending, diverged = [], range(0)
        for step, metrics in fetched:
            means = {k: float(total) / float(count or 1) for k, (total, count) in metrics.items()}
            if means["skipped"]:
                means = {"skipped": 1.0, "learning_rate": means["learning_rate"]}
                self.skipped_in_a_row += 1
                if self.skipped_in_a_row >= self.config.max_skipped:
                    diverged = range(step - self.skipped_in_a_row, step)
            else:
                self.loss, self.skipped_in_a_row = means["loss"], 0
            for writer in self.writers:
                writer.write(step, means)
        if diverged:
            raise DivergedError(
                f"the loss or gradient of {len(diverged)} steps in a row, up to step "
                f"{diverged.stop}, was not finite; the state is saved without their updates: look "
                f"at batches {diverged.start} to {diverged.stop - 1} of data seed "
                f"{self.task.data_seed}, or begin anew with a lower learning rate"
            )

    def evaluate(self) -> None:
        """Writes down an evaluation; one that a signal interrupts is made when the run resumes."""
        evaluation = evaluate(
            self.eval_step, self.state, self.task, self.feed, self.interruption.asked
        )
        if evaluation is None:
            self.leave()
        self.evaluation = evaluation
        values = {f"eval_{name}": value for name, value in self.evaluation.items()}
        for writer in self.writers:
            writer.write(self.step, values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in self.evaluation.items())
        self.progress.say(f"step {self.step}: held-out {shown}")
        self.heed()
        if self.task.sample:
            params = self.task.program.in_use(self.state.params, self.state.extra)
            text = self.task.sample(params, self.state.rng())
            if jax.process_index() == 0:
                samples = self.folder / "samples"
                samples.mkdir(exist_ok=True)
                (samples / f"{self.step:08d}.txt").write_text(text)

    def heed(self) -> None:
        """Changes of the state what the evaluation asks for."""
        if self.task.after_evaluation is not None:
            self.state = self.task.after_evaluation(self.state, self.evaluation)

    def save(self) -> None:
        """A checkpoint, with every line of metrics up to it already on disk."""
        if self.saved_step == self.step:
            return
        self.fetch()
        self.metrics.flush()
        self.checkpoints.save(self.step, self.state)
        self.saved_step = self.step
        self.status("running")

    def leave(self) -> NoReturn:
        """Ends as the signal asked, everything saved."""
        self.save()
        self.checkpoints.wait()
        raise SystemExit(EXIT_PREEMPTED)

    def speed(self, steps_per_second: float) -> str:
        program = self.task.program
        tokens = steps_per_second * program.tokens_per_step
        mfu = tokens * program.flops_per_token / (self.peak * self.mesh.size)
        return f"{tokens:,.0f} tokens/s  MFU {mfu:.0%} of {self.peak_source}"

    def status(self, status: str, why: str = "") -> None:
        if jax.process_index() == 0:
            now = runs.status_now(status, self.step, self.config.num_steps, loss=self.loss, why=why)
            write_json(self.folder / runs.FILE, dataclasses.asdict(now))

    def close(self, error: BaseException | None) -> None:
        """Writes down what is known and how it ended."""
        if error is None:
            self.metrics.flush()
            self.checkpoints.wait()
            self.status("finished")
        elif isinstance(error, SystemExit):
            self.status("preempted", "SIGTERM; run the same command with --resume")
        else:
            if isinstance(error, DivergedError):
                with contextlib.suppress(OSError):
                    self.save()
                    self.checkpoints.wait()
            self.status("failed", (str(error) or type(error).__name__).splitlines()[0])
        for writer in self.writers:
            writer.close()


def shapes(batch: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Of each array of a batch, or of several on end."""
    return tuple(array.shape for array in batch.values())
