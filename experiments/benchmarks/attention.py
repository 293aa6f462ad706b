"""Times sparse attention beside full attention: `python -m experiments.benchmarks.attention`.

The paper's shape (Yuan et al. 2025, section 4.1), causal, one row; to decode, many rows of one
query each. Scoring and the choice of blocks are part of what is timed. All contenders take turns,
so that whatever else the machine does falls on all; each ratio is to the fastest full attention.

Keys and queries are drawn at random, or clustered: alike for 256 positions at a time, so that
neighbouring queries choose the same blocks, as those of a trained model do more often.

With `--static v5e v6e` there is no device: the table is made of the TPU compiler's bundles
(`attention_static`, which says what is not in it). Decoding has no kernel, so that its row has what
XLA estimates. The stored tables and those of docs/sparse_attention.md are brought up to date by

    python -m experiments.benchmarks.attention --store --lengths 8192 65536 --static all
"""

import argparse
import functools
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import attention_static
from experiments.benchmarks.attention_counts import CLUSTER
from experiments.benchmarks.attention_table import MEASURED
from experiments.benchmarks.splash import splash_attention
from experiments.benchmarks.train_step import ratio_interval
from lineage_jax.kernels import (
    PAPER,
    Branches,
    compressed_attention,
    flash_attention,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from scaling.flops import keys_read

Attention = Callable[..., jax.Array]

TABLE_TOKENS = 8192
"""Of a row, at most, where scores are a table."""
BOTH = 7 / 2
"""FLOPs of forward and backward together over those of forward: seven products for two."""


def drawn(args: argparse.Namespace, length: int, queries: int) -> tuple[Any, Branches, Branches]:
    """Queries, and keys and values of each branch; `queries` of them, the last positions."""
    rows = args.rows if queries == 1 else 1
    lengths = Branches(PAPER.num_compressed(length), length, length)
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(count: int, heads: int, width: int) -> jax.Array:
        x = jax.random.normal(next(keys), (rows, count, heads, width), args.dtype)
        if args.selection == "random":
            return x
        size = max(1, CLUSTER * count // length)
        return 0.1 * x + jnp.repeat(x[:, ::size], size, axis=1)[:, :count]

    query = normal(length, args.heads, args.width)[:, -queries:]
    of_keys = Branches(*(normal(n, args.groups, args.width) for n in lengths))
    return query, of_keys, Branches(*(normal(n, args.groups, args.value_width) for n in lengths))


def full_contenders(length: int, queries: int) -> Mapping[str, Attention]:
    """Full attention of the last queries, by whatever computes it here."""
    offset = length - queries
    found: dict[str, Attention] = {
        "full, ours": lambda q, k, v: flash_attention(q, k.selected, v.selected, offset=offset)
    }
    if length <= TABLE_TOKENS or queries == 1:
        found["full, XLA"] = functools.partial(dot_product, "xla", queries)
    if jax.default_backend() == "gpu":
        found["full, cuDNN"] = functools.partial(dot_product, "cudnn", queries)
    if jax.default_backend() == "tpu" and queries > 1:
        found["full, splash"] = splash
    return found


def dot_product(
    implementation: Any, queries: int, query: jax.Array, keys: Branches, values: Branches
) -> jax.Array:
    """`jax.nn.dot_product_attention`; narrower values are filled up, as it wants one width."""
    narrow = query.shape[-1] - values.selected.shape[-1]
    filled = jnp.pad(values.selected, ((0, 0),) * 3 + ((0, narrow),))
    out = jax.nn.dot_product_attention(
        query, keys.selected, filled, is_causal=queries > 1, implementation=implementation
    )
    return out[..., : values.selected.shape[-1]]


def splash(query: jax.Array, keys: Branches, values: Branches) -> jax.Array:
    """jax's own kernel for TPU."""
    return splash_attention(query, keys.selected, values.selected)


def sparse_contenders(args: argparse.Namespace, length: int, queries: int) -> Mapping[str, Any]:
    """Native Sparse Attention of the last queries, and its branches; with the keys each reads."""
    offset = length - queries
    whole, less = keys_read(PAPER, length), keys_read(PAPER, offset)
    read = Branches(*(a - b for a, b in zip(whole, less, strict=True)))

    def sparse(query, keys, values):
        gates = jnp.full((*query.shape[:3], 3), 0.5, query.dtype)
        return native_sparse_attention(query, keys, values, gates, offset=offset)

    def compressed(query, keys, values):
        return compressed_attention(
            query, keys.compressed, values.compressed, length, offset=offset
        )

    def choice(query, keys):
        return select_blocks(query, keys.compressed, length, offset=offset)

    def selected(query, keys, values, blocks):
        return selected_attention(query, keys.selected, values.selected, blocks, offset=offset)

    def window(query, keys, values):
        return window_attention(query, keys.window, values.window, PAPER.window, offset=offset)

    return {
        "sparse": (sparse, sum(read)),
        "- compressed, choice": (compressed, read.compressed),
        "- selected": (selected, read.selected, choice),
        "- window": (window, read.window),
    }


def run_of(attend: Attention, given: tuple[Any, ...], *, both: bool) -> Callable[[], None]:
    """One call on the device, to its end; with the gradients of queries, keys and values, if
    `both`."""

    def total(*given):
        return jax.tree.leaves(attend(*given))[0].astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2)) if both else attend).lower(*given).compile()
    return lambda: jax.block_until_ready(compiled(*given))


def compare(args: argparse.Namespace, length: int, kind: str) -> list[dict[str, Any]]:
    """What each contender takes for one length, in turns; the first call of each is left out."""
    queries = 1 if kind == "decode" else length
    given: tuple[Any, ...] = drawn(args, length, queries)
    rows = given[0].shape[0]
    causal = sum(range(length - queries + 1, length + 1))
    runs, reads, refused = {}, {}, {}
    contenders: dict[str, Any] = {
        name: (attend, causal) for name, attend in full_contenders(length, queries).items()
    }
    for name, (attend, count, *choice) in (
        contenders | dict(sparse_contenders(args, length, queries))
    ).items():
        inputs = given
        try:
            if choice:
                inputs = *given, jax.jit(choice[0])(*given[:2])
            runs[name] = run_of(attend, inputs, both=kind == "both")
            runs[name]()
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            runs.pop(name, None)
            refused[name] = " ".join(str(error).split())[:100]
            continue
        reads[name] = count
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(took)) for name, took in seconds.items()}
    best = min((name for name in runs if name.startswith("full")), key=medians.__getitem__)
    told = [{"length": length, "kind": kind, "name": n, "refused": r} for n, r in refused.items()]
    for name in runs:
        flops = 2 * rows * args.heads * (args.width + args.value_width) * reads[name]
        stored = rows * args.groups * (args.width + args.value_width) * reads[name]
        told.append(
            {
                "length": length,
                "kind": kind,
                "name": name,
                "milliseconds": 1e3 * medians[name],
                "tflops": flops * (BOTH if kind == "both" else 1) / medians[name] / 1e12,
                "gbytes": stored * given[0].dtype.itemsize / medians[name] / 1e9
                if kind == "decode"
                else None,
                "ratio": medians[best] / medians[name],
                "interval": ratio_interval(*(np.array(seconds[n]) for n in (best, name))),
                "seconds": seconds[name],
            }
        )
    return told


def row(told: Mapping[str, Any]) -> str:
    """A line of the table."""
    begin = f"| {told['length']:,} | {told['kind']} | {told['name']} |"
    if "refused" in told:
        return f"{begin} refused: {told['refused']} | | | |"
    low, high = told["interval"]
    gbytes = "" if told["gbytes"] is None else f"{told['gbytes']:.1f}"
    return (
        f"{begin} {told['milliseconds']:.3f} | {told['tflops']:.2f} | {gbytes} | "
        f"{told['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2**n for n in range(13, 18)])
    parser.add_argument("--kinds", nargs="+", default=["forward", "both", "decode"])
    parser.add_argument("--selection", choices=["random", "clustered"], default="random")
    parser.add_argument("--rows", type=int, default=16, help="of the batch, to decode")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--value-width", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    static = parser.add_argument_group("without a device")
    static.add_argument("--static", nargs="+", metavar="CHIP", help="bundles; of all chips: all")
    static.add_argument("--branches", nargs="+", default=MEASURED, choices=MEASURED)
    static.add_argument("--quick", action="store_true", help="kernels alone, no whole programs")
    static.add_argument("--store", action="store_true", help="in the repository's tables")
    args = parser.parse_args(arguments)
    if args.static:
        try:
            attention_static.main(args)
        except (ImportError, ValueError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 1 if isinstance(error, RuntimeError) else 2
        return 0
    for kind in args.kinds:
        if kind not in ("forward", "both", "decode"):
            print(f"wanted kinds of forward, both and decode, got {kind!r}", file=sys.stderr)
            return 2
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    device = jax.devices()[0].device_kind
    machine = f"Python {platform.python_version()}, {device}, {args.selection} keys"
    print(", ".join(f"{k} {v}" for k, v in versions.items()) + f"; {machine}", end="\n\n")
    print("| tokens | what | | ms | TFLOP/s | GB/s | times as fast as full |")
    print("|---|---|---|---|---|---|---|")
    report: dict[str, Any] = {"versions": versions, "device": device, "results": []}
    for length in args.lengths:
        for kind in args.kinds:
            for told in compare(args, length, kind):
                report["results"].append(told)
                print(row(told), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
