"""Sweeps: many training runs over model sizes and token budgets, shared, killed and resumed.

A trial is one model at one learning rate. It is trained once at a constant rate, its state kept at
several steps, and each token budget is a short cool-down from one of them (warm-up, stable, decay:
Hu et al. 2024; Haegele et al. 2024), so that several budgets cost little more than the longest.
The learning rate is tuned for each size, at one budget, until the best has a worse neighbour on
either side: an untuned rate bends the exponents (Porian et al. 2024, section 3).

The sweep is a folder. A point (trial, budget) is finished when its file stands, and every state it
starts from is on disk, so the same command goes on where it was killed, and the same command on
many machines over one shared (POSIX) folder shares the work: a trial is claimed by creating a file,
which only one can.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lineage_jax import sharding
from lineage_jax.data.packing import Batches, shapes
from lineage_jax.train.checkpoint import Checkpoints
from lineage_jax.train.metrics import write_json
from lineage_jax.train.optim import OptimizerConfig, decay_start, learning_rate
from lineage_jax.train.program import make_eval_step
from lineage_jax.train.progress import Progress
from lineage_jax.train.state import TrainState
from lineage_jax.train.step import LossFn, make_train_step, many_steps
from lineage_jax.typing import PRNGKeyArray

STALE_AFTER = 900.0  # seconds without a sign of life (compiling gives none) that free a claim
CHUNK = 10  # steps in one call of the compiled program; every budget is a multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """One model size of a sweep.

    Attributes:
      name: unique, for people.
      init: boxed parameters from a key.
      loss_fn: in training.
      eval_loss_fn: in evaluation.
      tx: the optimiser, whose update takes `learning_rate`.
      params: number of parameters, with embeddings.
      params_no_embed: without (Kaplan et al. 2020, section 2.1).
      flops_per_token: of forward and backward.
      budgets: training steps of each run, ascending; multiples of `CHUNK`.
      learning_rate: where tuning starts.
      shape: what else a table of runs should say of it (layers, width, ...).
    """

    name: str
    init: Callable[[PRNGKeyArray], Any]
    loss_fn: LossFn
    eval_loss_fn: LossFn
    tx: optax.GradientTransformation
    params: int
    params_no_embed: int
    flops_per_token: int
    budgets: tuple[int, ...]
    learning_rate: float
    shape: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A grid of runs.

    Attributes:
      name: of the sweep.
      sizes: the models, ascending.
      train: batches of the text they all learn from.
      heldout: batches of the text that they are measured on.
      eval_batches: how many of them, the same for every run.
      bytes_per_token: for bits per byte, or None.
      optimizer: a "wsd" schedule; its learning rate is replaced by each trial's.
      tune_budget: which of each size's budgets the learning rate is tuned at.
      lanes: learning rates of one size that are tuned as one vmapped program. On a CPU, in turn
        is faster; an accelerator that one small model does not fill wants more.
      seed: of the initial parameters.
      facts: what was held fixed, for the checklist of the report.
    """

    name: str
    sizes: tuple[Size, ...]
    train: Batches
    heldout: Batches
    eval_batches: int
    bytes_per_token: float | None
    optimizer: OptimizerConfig
    tune_budget: int = 0
    lanes: int = 1
    seed: int = 0
    facts: Mapping[str, str]

    def __post_init__(self):
        if self.optimizer.schedule != "wsd":
            raise ValueError(f"a sweep needs the schedule 'wsd', got {self.optimizer.schedule!r}")
        for size in self.sizes:
            if any(steps % CHUNK for steps in size.budgets) or list(size.budgets) != sorted(
                set(size.budgets)
            ):
                raise ValueError(
                    f"budgets must be ascending multiples of {CHUNK} steps, got {size.budgets}"
                )

    def identity(self) -> str:
        """A digest of everything that the results depend on, but for the versions of packages."""
        told = {
            "name": self.name,
            "sizes": [
                (s.name, s.params, s.budgets, s.learning_rate, dict(s.shape)) for s in self.sizes
            ],
            "train": (self.train.stream.digest, self.train.batch_size, self.train.seq_len),
            "heldout": (self.heldout.stream.digest, self.eval_batches),
            "optimizer": dataclasses.asdict(self.optimizer),
            "tune_budget": self.tune_budget,
            "lanes": self.lanes,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Trial:
    """One model at one learning rate."""

    size: Size
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.size.name}-lr{self.learning_rate:.2e}"


def run(sweep: Sweep, folder: str | os.PathLike, mesh: Mesh, progress: Progress) -> None:
    """Trains every run of the sweep that is not finished, alone or beside other workers.

    Returns when all points stand in `folder/points`; `runs_table` reads them.

    Raises:
      ValueError: if the folder holds another sweep, or the mesh does not fit the batch.
    """
    arrays = shapes(sweep.train.batch_size, sweep.train.seq_len)
    feed = sharding.Feed(sharding.named(arrays, ("batch", "length")), mesh)
    work = Folder(pathlib.Path(folder), sweep)
    bar = progress.add(f"sweep {sweep.name}", expected_points(sweep))
    programs: dict[str, Program] = {}
    while wanted := outstanding(sweep, work):
        progress.update(bar, work.num_points(), f"{wanted[0][0].size.name} next")
        for group in grouped(sweep, wanted):
            with work.claim([trial for trial, _ in group]) as claimed:
                if not claimed:
                    continue
                size = group[0][0].size
                if size.name not in programs:
                    programs[size.name] = Program(sweep, size, mesh, feed)
                make_points(group, programs[size.name], work, progress)
                break
        else:  # every trial that is left is another worker's
            time.sleep(1.0)
    progress.update(bar, expected_points(sweep), "done")


def outstanding(sweep: Sweep, work: "Folder") -> list[tuple[Trial, int]]:
    """The points (trial, index of its budget) that can be made now, given those that stand.

    The largest sizes come first: the small ones fill the time in which others are at the large.
    """
    wanted: list[tuple[Trial, int]] = []
    for size in reversed(sweep.sizes):
        losses = work.losses(size, sweep.tune_budget)
        octaves = {round(math.log2(rate / size.learning_rate)): loss for rate, loss in losses}
        missing = next_octaves(octaves)
        if missing:
            rates = [size.learning_rate * 2.0**octave for octave in missing]
            wanted += [(Trial(size, rate), sweep.tune_budget) for rate in rates]
        else:
            best = Trial(size, size.learning_rate * 2.0 ** best_octave(octaves))
            wanted += [
                (best, i) for i in range(len(size.budgets)) if not work.point(best, i).exists()
            ]
    return wanted


def best_octave(losses: Mapping[int, float]) -> int:
    """The octave with the lowest finite loss; the lower rate if two are equal."""
    return min(losses, key=lambda octave: (math.inf if math.isnan(losses[octave])
                                           else losses[octave], octave))  # fmt: skip


def next_octaves(losses: Mapping[int, float], limit: int = 4) -> list[int]:
    """Which learning rates, in octaves from the first guess, are to be tried next.

    The best must have been tried with its neighbours on both sides; within `limit` of the guess.
    """
    first = [k for k in (0, -1, 1) if k not in losses]
    if first:  # all three, so that the walk is the same however many workers share it
        return first
    best = best_octave(losses)
    return [k for k in (best - 1, best + 1) if k not in losses and abs(k) <= limit]


def expected_points(sweep: Sweep) -> int:
    """How many points there will be, if three learning rates are enough for each size."""
    return sum(len(size.budgets) + 2 for size in sweep.sizes)


def grouped(sweep: Sweep, wanted: Sequence[tuple[Trial, int]]) -> Iterator[list[tuple[Trial, int]]]:
    """Points that run as one program: those of one size and budget, `lanes` at a time."""
    rest = list(wanted)
    while rest:
        first = rest[0]
        same = [w for w in rest if (w[0].size, w[1]) == (first[0].size, first[1])][: sweep.lanes]
        rest = [w for w in rest if w not in same]
        yield same


class Program:
    """The compiled training and evaluation of one size, for every learning rate and budget."""

    def __init__(self, sweep: Sweep, size: Size, mesh: Mesh, feed: sharding.Feed):
        self.sweep, self.size, self.mesh, self.feed = sweep, size, mesh, feed

        def create():
            params = size.init(jax.random.key(sweep.seed))
            return TrainState.create(params, size.tx, seed=sweep.seed)

        self.initial_state = sharding.sharded(create, mesh)
        step = make_train_step(size.loss_fn, size.tx, max_grad_norm=sweep.optimizer.max_grad_norm)
        self.steps = jax.jit(many_steps(step), donate_argnums=0)
        self.lane_steps = jax.jit(jax.vmap(many_steps(step), in_axes=(0, None, 0)))
        eval_step = make_eval_step(size.eval_loss_fn)
        self.evaluate = jax.jit(
            lambda state, batches: jax.lax.map(lambda batch: eval_step(state, batch), batches)
        )

    def advance(
        self,
        states: Sequence[TrainState],
        rates: Callable[[int], Sequence[float]],
        start: int,
        stop: int,
        tick: Callable[[int, float], None],
    ) -> tuple[list[TrainState], np.ndarray]:
        """Trains each state from step `start` to `stop`.

        Args:
          states: one for each lane.
          rates: the learning rate of each lane at a step.
          start, stop: multiples of `CHUNK`.
          tick: told the step and the mean loss after each chunk.

        Returns:
          The new states, and the mean training loss of each chunk, [lanes, chunks].
        """
        losses = []
        lanes = len(states)
        carry = states[0] if lanes == 1 else jax.tree.map(lambda *x: jnp.stack(x), *states)
        with sharding.use(self.mesh):
            for step in range(start, stop, CHUNK):
                rows = self.sweep.train.stack(step, CHUNK, self.feed.rows)
                batches = self.feed.stack(rows)
                rate = np.array([rates(s) for s in range(step, step + CHUNK)], np.float32).T
                if lanes == 1:
                    carry, metrics = self.steps(carry, batches, rate[0])
                else:
                    carry, metrics = self.lane_steps(carry, batches, rate)
                total, count = (np.asarray(x, np.float64) for x in metrics["loss"])
                chunk = (total.reshape(lanes, CHUNK) / count.reshape(lanes, CHUNK)).mean(1)
                losses.append(chunk)
                tick(step + CHUNK, float(chunk.mean()))
        if lanes == 1:
            return [carry], np.array(losses).reshape(-1, 1).T
        return [jax.tree.map(lambda x, i=i: x[i], carry) for i in range(lanes)], np.array(losses).T

    def heldout_loss(self, state: TrainState) -> float:
        """Nats per token over the sweep's evaluation batches; NaN if not finite."""
        rows = self.sweep.heldout.stack(0, self.sweep.eval_batches, self.feed.rows)
        batches = self.feed.stack(rows)
        with sharding.use(self.mesh):
            total, count = jax.device_get(self.evaluate(state, batches)["loss"])
        return float(np.sum(total, dtype=np.float64) / np.sum(count, dtype=np.float64))


def make_points(
    group: Sequence[tuple[Trial, int]], program: Program, work: "Folder", progress: Progress
) -> None:
    """Trains the points of one group, from the latest states on disk, and writes them down."""
    began = time.perf_counter()
    trials, index = [trial for trial, _ in group], group[0][1]
    size, sweep = program.size, program.sweep
    budget = size.budgets[index]
    turn = decay_start(sweep.optimizer, budget) // CHUNK * CHUNK
    tried = ", ".join(f"{trial.learning_rate:.2g}" for trial in trials)
    shown = f"  {size.name} at {tried}, {budget} steps"
    bar = progress.add(shown, budget)

    def tick(step: int, loss: float) -> None:
        work.sign_of_life(trials)
        progress.update(bar, step, f"loss {loss:.3f}")

    def rates(step: int) -> list[float]:
        configs = (dataclasses.replace(sweep.optimizer, learning_rate=t.learning_rate)
                   for t in trials)  # fmt: skip
        return [learning_rate(config, step, budget) for config in configs]

    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(Checkpoints(work.trial(t), keep=None)) for t in trials]
        start, states, curves = trunk(kept, turn, program, work, trials)
        if start < turn:
            states, losses = program.advance(states, rates, start, turn, tick)
            curves = [c + list(map(float, row)) for c, row in zip(curves, losses, strict=True)]
            for checkpoints, trial, state, curve in zip(kept, trials, states, curves, strict=True):
                checkpoints.save(turn, state)
                checkpoints.wait()
                write_json(work.curve(trial, turn), curve)
        states, losses = program.advance(states, rates, turn, budget, tick)
        curves = [c + list(map(float, row)) for c, row in zip(curves, losses, strict=True)]
    for trial, state, curve in zip(trials, states, curves, strict=True):
        loss = program.heldout_loss(state)
        write_json(work.point(trial, index), {"loss": loss, "curve": curve})
        seconds = (time.perf_counter() - began) / len(trials)
        write_json(work.timing(trial, index), {"seconds": seconds, "host": socket.gethostname()})
    progress.remove(bar)


def trunk(
    kept: Sequence[Checkpoints],
    turn: int,
    program: Program,
    work: "Folder",
    trials: Sequence[Trial],
) -> tuple[int, list[TrainState], list[list[float]]]:
    """The latest stable states up to step `turn` that all trials have: (step, states, curves)."""
    like = program.initial_state()
    common = set.intersection(*(set(checkpoints.saved_steps()) for checkpoints in kept))
    for step in sorted((step for step in common if step <= turn), reverse=True):
        paths = [work.curve(trial, step) for trial in trials]
        if all(path.exists() for path in paths):
            with contextlib.suppress(OSError):  # damaged: train that stretch again
                states = [checkpoints.restore(step, like) for checkpoints in kept]
                return step, states, [json.loads(path.read_text()) for path in paths]
    # The program donates its argument, so each trial needs initial parameters of its own.
    return 0, [program.initial_state() for _ in trials], [[] for _ in trials]


class Folder:
    """Where a sweep lives: its identity, its claims, states, points and timings."""

    def __init__(self, path: pathlib.Path, sweep: Sweep):
        self.path, self.sweep = path, sweep
        for name in ("points", "timings", "claims", "trials"):
            (path / name).mkdir(parents=True, exist_ok=True)
        spec = path / "sweep.json"
        mine = {"name": sweep.name, "identity": sweep.identity()}
        if spec.exists() and json.loads(spec.read_text()) != mine:
            raise ValueError(
                f"{path} holds another sweep (its settings or its text differ from these); "
                "choose another folder with --dir, or delete it"
            )
        if not spec.exists():
            write_json(spec, mine)

    def trial(self, trial: Trial) -> pathlib.Path:
        return self.path / "trials" / trial.name

    def curve(self, trial: Trial, step: int) -> pathlib.Path:
        return self.trial(trial) / f"curve-{step}.json"

    def point(self, trial: Trial, index: int) -> pathlib.Path:
        return self.path / "points" / f"{point_id(trial, index)}.json"

    def timing(self, trial: Trial, index: int) -> pathlib.Path:
        return self.path / "timings" / f"{point_id(trial, index)}.json"

    def num_points(self) -> int:
        return sum(1 for _ in (self.path / "points").glob("*.json"))

    def losses(self, size: Size, index: int) -> list[tuple[float, float]]:
        """(learning rate, loss) of each trial of this size that has the point of this budget."""
        found = []
        for octave in range(-8, 9):
            rate = size.learning_rate * 2.0**octave
            path = self.point(Trial(size, rate), index)
            if path.exists():
                found.append((rate, json.loads(path.read_text())["loss"]))
        return found

    def finished(self, size: Size) -> list[tuple[Trial, int]]:
        """The points of one size that stand, by learning rate and budget."""
        indices = range(len(size.budgets))
        rates = {rate for index in indices for rate, _ in self.losses(size, index)}
        wanted = [(Trial(size, rate), index) for rate in sorted(rates) for index in indices]
        return [(trial, index) for trial, index in wanted if self.point(trial, index).exists()]

    @contextlib.contextmanager
    def claim(self, trials: Sequence[Trial]) -> Iterator[bool]:
        """Holds the trials for this process while the block runs; False if another has one."""
        held: list[pathlib.Path] = []
        try:
            for trial in trials:
                path = self.path / "claims" / trial.name
                if not take(path):
                    break
                held.append(path)
            yield len(held) == len(trials)
        finally:
            for path in held:
                path.unlink(missing_ok=True)

    def sign_of_life(self, trials: Sequence[Trial]) -> None:
        """Tells other workers that these trials are being worked on."""
        for trial in trials:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path / "claims" / trial.name)


def take(path: pathlib.Path) -> bool:
    """Creates a claim, which only one process can; a dead process's claim is cleared first."""
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    for _ in range(2):
        try:
            with path.open("x") as file:
                json.dump(me, file)
            return True
        except FileExistsError:
            if not abandoned(path):
                return False
            # Of several that see it abandoned, one wins the rename; the others try again.
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_name(f".{path.name}-{uuid.uuid4().hex}")).unlink()
    return False


def abandoned(path: pathlib.Path) -> bool:
    """Whether a claim's process is known to be dead, or has not been heard of for long."""
    try:
        silent = time.time() - path.stat().st_mtime
        owner = json.loads(path.read_text() or "{}")
    except (FileNotFoundError, ValueError):
        return False
    if owner.get("host") == socket.gethostname() and not alive(owner["pid"]):
        return True
    return silent > STALE_AFTER


def alive(pid: int) -> bool:
    """Whether another process of this machine has that id."""
    if pid == os.getpid():  # left by a process of the past: a process never claims twice
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # ended, though its parent has not asked how (Linux)
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def point_id(trial: Trial, index: int) -> str:
    """The run_id of a point."""
    return f"{trial.name}-{trial.size.budgets[index]}"


def runs_table(
    sweep: Sweep, folder: str | os.PathLike
) -> tuple[dict[str, list[Any]], dict[str, list[Any]], dict[str, list[Any]]]:
    """The finished points as columns: (runs, curves, timings), each in a fixed order."""
    work = Folder(pathlib.Path(folder), sweep)
    runs: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    for size in sweep.sizes:
        for trial, index in work.finished(size):
            path = work.point(trial, index)
            point = json.loads(path.read_text())
            runs.append(run_row(sweep, trial, index, point["loss"]))
            curves += curve_rows(sweep, trial, index, point["curve"])
            if work.timing(trial, index).exists():
                timing = json.loads(work.timing(trial, index).read_text())
                timings.append({"run_id": path.stem, **timing})
    return columns(runs), columns(curves), columns(timings)


def run_row(sweep: Sweep, trial: Trial, index: int, loss: float) -> dict[str, Any]:
    """One row of the runs table."""
    size, batch_tokens = trial.size, sweep.train.tokens_per_batch
    tokens = size.budgets[index] * batch_tokens
    per_byte = sweep.bytes_per_token
    return {
        "run_id": point_id(trial, index),
        "model": size.name,
        "params": size.params,
        "params_no_embed": size.params_no_embed,
        "params_active": size.params,
        "tokens": tokens,
        "flops": float(tokens * size.flops_per_token),
        "flops_convention": "weights, causal attention and head, forward and backward",
        "loss": loss,
        "bits_per_byte": loss / math.log(2) / per_byte if per_byte else math.nan,
        "learning_rate": trial.learning_rate,
        "batch_tokens": batch_tokens,
        "seed": sweep.seed,
        "schedule": "wsd",
        "decayed": True,
        "diverged": not math.isfinite(loss),
        **size.shape,
    }


def curve_rows(
    sweep: Sweep, trial: Trial, index: int, curve: Sequence[float]
) -> list[dict[str, Any]]:
    """The training-loss curve of one point, a row for each chunk of steps."""
    rows = []
    for i, loss in enumerate(curve):
        step = (i + 1) * CHUNK
        tokens = step * sweep.train.tokens_per_batch
        rows.append(
            {
                "run_id": point_id(trial, index),
                "step": step,
                "tokens": tokens,
                "flops": float(tokens * trial.size.flops_per_token),
                "loss": loss,
            }
        )
    return rows


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows with the same keys, turned into columns."""
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
