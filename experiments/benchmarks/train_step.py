"""Times one training step here and in plain PyTorch: `python -m experiments.benchmarks.train_step`.

The same GPT, weights, batches, optimiser and number of threads, float32, on CPU. Each contender
runs in a process of its own, so that peak memory is its own; they take turns, a block of steps
each, so that whatever else the machine does falls on all of them. A block here is one call of one
compiled program, by default of as many steps as `lineage train` takes in a call on CPU; in PyTorch
it is a loop. PyTorch runs twice, with the default AdamW and with the fused one, and the faster
counts.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

OURS, THEIRS = "lineage_jax", ("torch", "torch fused")
LOSS_TOLERANCE = 1e-4  # nats per token: the project's tolerance, end to end
COMPARED_STEPS = 3  # rounding differences grow from step to step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of the model and of its batch."""

    num_layers: int
    embed_dim: int
    num_heads: int
    vocab_size: int
    length: int
    batch_size: int

    def model_config(self):
        from lineage_jax.models.gpt import GPTConfig

        sizes = dataclasses.asdict(self)
        del sizes["batch_size"]
        return GPTConfig(max_len=sizes.pop("length"), **sizes)

    def batches(self, start: int, num_steps: int) -> np.ndarray:
        """Random tokens of `num_steps` steps from step `start`, shape (num_steps, B, T + 1)."""
        return np.stack(
            [
                np.random.default_rng(step).integers(
                    self.vocab_size, size=(self.batch_size, self.length + 1), dtype=np.int32
                )
                for step in range(start, start + num_steps)
            ]
        )


SHAPES = {
    "tiny": Shape(
        num_layers=4, embed_dim=256, num_heads=4, vocab_size=8192, length=256, batch_size=8
    ),
    # Radford et al. 2019, table 2, first row
    "gpt2_small": Shape(
        num_layers=12, embed_dim=768, num_heads=12, vocab_size=50_257, length=256, batch_size=1
    ),
    "smoke": Shape(num_layers=2, embed_dim=32, num_heads=2, vocab_size=64, length=16, batch_size=2),
}


def jax_contender(shape: Shape, weights: Path, steps: int):
    """The training step of this repository; writes its initial weights for the others."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from flax.traverse_util import flatten_dict

    from lineage_jax.models.gpt import GPT
    from lineage_jax.objectives.language import next_token_loss
    from lineage_jax.train.optim import OptimizerConfig, adamw
    from lineage_jax.train.state import TrainState
    from lineage_jax.train.step import make_train_step, many_steps

    model, optimizer = GPT(shape.model_config()), OptimizerConfig()

    def loss_fn(params, extra, batch, rng):
        tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        logits, _ = model.apply({"params": params}, tokens, train=True, rngs={"dropout": rng})
        loss, metrics = next_token_loss(logits, targets, jnp.ones(targets.shape, bool))
        return loss, (extra, metrics)

    @jax.jit
    def init(key):
        return nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])

    params, tx = init(jax.random.key(0)), adamw(optimizer)
    if not weights.exists():
        np.savez(weights, **flatten_dict(params, sep="/"))
    step = make_train_step(loss_fn, tx, max_grad_norm=optimizer.max_grad_norm)
    run = jax.jit(many_steps(step), donate_argnums=0)
    state, rates = TrainState.create(params, tx), jnp.full(steps, optimizer.learning_rate)

    def block(tokens: np.ndarray) -> list[float]:
        nonlocal state
        state, metrics = run(state, {"tokens": tokens}, rates)
        total, count = metrics["loss"]
        return (total / count).tolist()

    return block


def torch_contender(shape: Shape, weights: Path, *, fused: bool, threads: int):
    """The same step in PyTorch, from the same weights."""
    import torch

    from experiments.benchmarks.torch_gpt import Trainer
    from lineage_jax.train.optim import OptimizerConfig

    torch.set_num_threads(threads)
    with np.load(weights) as params:
        trainer = Trainer(shape.model_config(), OptimizerConfig(), params, fused=fused)
    return lambda tokens: [trainer.step(rows) for rows in tokens]


def work(name: str, shape: Shape, weights: Path, steps: int, threads: int) -> None:
    """A contender's process: for each line read it takes a block of steps and prints its cost."""
    import resource

    if hasattr(os, "sched_setaffinity"):  # XLA takes a thread for each core it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if name == OURS:
        block = jax_contender(shape, weights, steps)
    else:
        block = torch_contender(shape, weights, fused=name == "torch fused", threads=threads)
    done = 0
    for _ in sys.stdin:
        tokens = shape.batches(done, steps)
        start = time.perf_counter()
        losses = block(tokens)
        seconds = time.perf_counter() - start
        done += steps
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        print(json.dumps({"losses": losses, "seconds": seconds, "peak": peak}), flush=True)


class Contender:
    """A contender, run in a process of its own."""

    def __init__(self, name: str, shape: str, weights: Path, steps: int, threads: int, **env: str):
        self.name, self.steps = name, steps
        arguments = ["--work", name, "--shapes", shape, "--weights", str(weights)]
        arguments += ["--steps", str(steps), "--threads", str(threads)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmarks.train_step", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        )
        self.seconds: list[float] = []  # of one step, in each round
        self.losses: list[float] = []
        self.peak = 0  # bytes

    def block(self) -> None:
        """Takes one block of steps."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the process of {self.name} ended early; its error stands above")
        answer = json.loads(line)
        self.losses += answer["losses"]
        self.seconds.append(answer["seconds"] / self.steps)
        self.peak = answer["peak"]

    def close(self) -> None:
        self.process.communicate()


def ratio_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians, rounds resampled in pairs."""
    rounds = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    ratios = np.median(ours[rounds], axis=1) / np.median(theirs[rounds], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def compare(shape: str, *, rounds: int, steps: int, threads: int) -> dict:
    """Times a shape in turns; the first block of each is left out of the times."""
    with tempfile.TemporaryDirectory() as folder:
        weights, contenders = Path(folder) / "weights.npz", []
        try:
            for name in (OURS, *THEIRS):  # in this order: ours writes the weights
                contenders.append(Contender(name, shape, weights, steps, threads))
                contenders[-1].block()
            for contender in contenders:
                contender.seconds.clear()
            for _ in range(rounds):
                for contender in contenders:
                    contender.block()
        finally:
            for contender in contenders:
                contender.close()
    ours, *theirs = contenders
    for other in theirs:
        gaps = np.abs(np.subtract(ours.losses, other.losses))[:COMPARED_STEPS]
        if not gaps.max() < LOSS_TOLERANCE:
            raise ValueError(f"{ours.name} and {other.name} differ by {gaps.max():.1e} in loss")
    best = min(theirs, key=lambda other: np.median(other.seconds))
    medians = {c.name: float(np.median(c.seconds)) for c in contenders}
    return {
        "shape": shape,
        "seconds": medians,
        "rounds": {c.name: c.seconds for c in contenders},
        "peak_bytes": {c.name: c.peak for c in contenders},
        "ratio": medians[OURS] / medians[best.name],
        "interval": ratio_interval(np.array(ours.seconds), np.array(best.seconds)),
        "against": best.name,
        "losses": ours.losses[:COMPARED_STEPS],
    }


def startup(shape: str, threads: int) -> dict[str, float]:
    """Seconds from the start of a process to its first finished step, by compilation cache."""
    with tempfile.TemporaryDirectory() as folder:
        env = {
            "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        times = {}
        runs = (("weights", OURS), ("cold", OURS), ("warm", OURS), ("torch", "torch"))
        for label, name in runs:
            # The first run only writes the weights that PyTorch starts from.
            cache = {} if label in ("weights", "torch") else env
            start = time.perf_counter()
            contender = Contender(name, shape, Path(folder) / "weights.npz", 1, threads, **cache)
            contender.block()
            times[label] = time.perf_counter() - start
            contender.close()
    del times["weights"]
    return times


def describe(result: dict) -> str:
    """A result in a few lines."""
    low, high = result["interval"]
    lines = [f"{result['shape']}: {SHAPES[result['shape']]}"]
    for name, seconds in result["seconds"].items():
        peak = result["peak_bytes"][name] / 1e6
        lines.append(f"  {name:<12} {seconds * 1e3:8.1f} ms a step (median), peak {peak:6.0f} MB")
    return "\n".join(
        [
            *lines,
            f"  {OURS} / {result['against']}: {result['ratio']:.3f} (95 % {low:.3f} to {high:.3f})",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "gpt2_small"])
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each contender")
    parser.add_argument("--steps", type=int, default=5, help="steps in a block")
    parser.add_argument("--threads", type=int, default=cores, help="cores of each contender")
    parser.add_argument(
        "--quick", action="store_true", help="one small shape, three rounds, no start-up"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--work", choices=(OURS, *THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        work(args.work, SHAPES[args.shapes[0]], args.weights, args.steps, args.threads)
        return 0
    try:
        import torch  # noqa: F401
    except ImportError:
        print("this compares with PyTorch: pip install torch", file=sys.stderr)
        return 2
    if args.quick:
        args.shapes, args.rounds, args.steps = ["smoke"], 3, 4
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "torch")}
    report = {"python": platform.python_version(), "versions": versions, "threads": args.threads}
    print(", ".join(f"{k} {v}" for k, v in versions.items()) + f"; {args.threads} threads")
    if not args.quick:
        report["startup"] = startup(args.shapes[0], args.threads)
        times = ", ".join(f"{label} {took:.1f} s" for label, took in report["startup"].items())
        print(f"{args.shapes[0]}: process start to first step, by compilation cache: {times}")
    report["results"] = []
    for shape in args.shapes:
        options = dict(rounds=args.rounds, steps=args.steps, threads=args.threads)
        report["results"].append(compare(shape, **options))
        print(describe(report["results"][-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
