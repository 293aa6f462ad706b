"""Times decoding here and in `transformers`: `python -m experiments.benchmarks.decoding`.

GPT-2 of one size with random weights, the same in both, float32, on CPU; greedy, with a cache,
from prompts of 16 tokens. The tokens must be the same. The two take turns, so that whatever else
the machine does falls on both.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.train_step import ratio_interval

PROMPT = 16  # tokens


def ours(model: Any, prompt: np.ndarray, num_tokens: int) -> Callable[[], np.ndarray]:
    """This project's `generate`, compiled, on parameters laid out for decoding."""
    import jax
    import jax.numpy as jnp

    from lineage_jax.models.gpt import empty_cache
    from lineage_jax.sampling.decode import Sampling, generate
    from lineage_jax.sampling.layout import for_decoding

    rows, length = prompt.shape
    params = jax.jit(for_decoding)(model.params)

    @jax.jit
    def run(params, prompt):
        return generate(
            lambda *inputs: model.module.apply({"params": params}, *inputs[:2], cache=inputs[2]),
            empty_cache(model.config, rows, length + num_tokens),
            prompt,
            jnp.full(rows, length),
            num_tokens,
            jax.random.key(0),
            Sampling(temperature=0.0),
        )

    return lambda: np.asarray(run(params, prompt))


def theirs(
    folder: str, prompt: np.ndarray, num_tokens: int, threads: int
) -> Callable[[], np.ndarray]:
    """`transformers.generate` on the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompt.tolist())
    options: Any = dict(max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)

    @torch.no_grad()
    def run() -> np.ndarray:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        return found[:, prompt.shape[1] :].numpy()

    return run


def random_gpt2(num_layers: int, embed_dim: int, num_heads: int, vocab_size: int) -> Any:
    """A GPT-2 as it begins, its norms and biases random too."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from lineage_jax.models.gpt import GPT, GPTConfig
    from lineage_jax.pretrained.weights import ARCHITECTURES, Pretrained

    config = GPTConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        vocab_size=vocab_size,
        max_len=1024,
    )
    module = GPT(config)
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), nn.unbox(boxed)
    )
    return Pretrained(
        config=config,
        module=module,
        params=params,
        architecture=ARCHITECTURES["GPT2LMHeadModel"],
        theirs={"bos_token_id": None, "eos_token_id": None},
    )


def compare(model: Any, batch_size: int, num_tokens: int, rounds: int, threads: int) -> dict:
    """Tokens a second of both, in turns; the first run of each is left out."""
    vocab_size = model.config.vocab_size
    prompt = np.random.default_rng(1).integers(0, vocab_size, (batch_size, PROMPT), np.int32)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        runs = {
            "lineage_jax": ours(model, prompt, num_tokens),
            "transformers": theirs(folder, prompt, num_tokens, threads),
        }
    first = {name: run() for name, run in runs.items()}
    if not (first["lineage_jax"] == first["transformers"]).all():
        raise ValueError("the tokens differ: nothing is compared")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    count = batch_size * num_tokens
    speed = {name: count / float(np.median(took)) for name, took in seconds.items()}
    slow, fast = (np.array(seconds[name]) for name in ("transformers", "lineage_jax"))
    return {
        "batch_size": batch_size,
        "num_tokens": num_tokens,
        "tokens_per_second": speed,
        "ratio": float(np.median(slow) / np.median(fast)),
        "interval": ratio_interval(slow, fast),
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=cores, help="of PyTorch")
    parser.add_argument("--quick", action="store_true", help="a small model, three rounds")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(arguments)
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        print("this compares with `transformers`: pip install torch transformers", file=sys.stderr)
        return 2
    shape = dict(num_layers=12, embed_dim=768, num_heads=12, vocab_size=50_257)
    if args.quick:
        shape = dict(num_layers=2, embed_dim=32, num_heads=2, vocab_size=64)
        args.rounds, args.num_tokens = 3, 8
    packages = ("jax", "flax", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    report: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    print(", ".join(f"{k} {v}" for k, v in versions.items()) + f"; {args.threads} threads")
    model, report["results"] = random_gpt2(**shape), []
    for batch_size in args.batch_sizes:
        told = compare(model, batch_size, args.num_tokens, args.rounds, args.threads)
        report["results"].append(told)
        low, high = told["interval"]
        speeds = ", ".join(f"{k} {v:.1f}" for k, v in told["tokens_per_second"].items())
        print(f"batch {batch_size}: tokens a second: {speeds}")
        print(f"  lineage_jax / transformers: {told['ratio']:.2f} (95 % {low:.2f} to {high:.2f})")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
