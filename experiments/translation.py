"""What every experiment on translation has in common, whatever its model.

A model here is a module with the Transformer's calls (`lineage_jax.models.transformer`): source,
tokens and their masks in, logits out; `start` and `decode` for one token after another. Its config
has a `source_vocab_size` and a `vocab_size`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from lineage_jax import sharding
from lineage_jax.data.pair_batches import shapes
from lineage_jax.data.pairs import PairsData, PairsDataset, load_pairs
from lineage_jax.objectives.language import next_token_loss
from lineage_jax.sampling.decode import Sampling, generate
from lineage_jax.train.loop import Task, TrainConfig
from lineage_jax.train.optim import OptimizerConfig, adamw, learning_rate
from lineage_jax.train.program import Program
from lineage_jax.train.step import LossFn
from lineage_jax.typing import Params, PRNGKeyArray

Arrays = Mapping[str, tuple[tuple[int, ...], type]]
"""Shape and type of each array of a batch."""

LIKELIEST = Sampling(temperature=0.0)


class Experiment(Protocol):
    """What a run on pairs depends on."""

    @property
    def data(self) -> PairsData: ...
    @property
    def model(self) -> Any: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    def program(self) -> Program: ...


def task(name: str, experiment: Experiment, module: nn.Module) -> Task:
    """Reads the pairs and joins them with the program.

    Args:
      name: of the milestone.
      experiment: its settings.
      module: the model of `experiment.model`.

    Raises:
      ValueError: if the pairs have ids, or rows longer, than the model has room for.
      OSError: if they cannot be read.
    """
    optimizer, num_steps = experiment.optimizer, experiment.train.num_steps
    pairs = load_pairs(experiment.data)
    check_fit(pairs, experiment.data, experiment.model)

    def eval_batches(rows: np.ndarray) -> Iterator[Mapping[str, np.ndarray]]:
        for step in range(pairs.heldout.num_batches):
            yield pairs.heldout(step, rows)

    return Task(
        name=name,
        program=experiment.program(),
        learning_rate=lambda step: learning_rate(optimizer, step, num_steps),
        train_batch=pairs.train,
        eval_batches=eval_batches,
        summarise=lambda means: {**means, "perplexity": float(np.exp(means["loss"]))},
        sample=sampler(module, pairs, experiment.data.target_len),
        data_seed=experiment.data.seed,
        provenance=pairs.provenance(),
    )


def program(
    optimizer: OptimizerConfig, module: nn.Module, arrays: Arrays, smoothing: float = 0.0
) -> Program:
    """What is compiled to train `module`, which needs no data.

    Args:
      optimizer: its settings.
      module: the model.
      arrays: shape and type of each array of a batch (`shapes`).
      smoothing: of the targets.
    """
    return Program(
        init=lambda key: (init(module, key), {}),
        loss_fn=loss_fn(module, train=True, smoothing=smoothing),
        eval_loss_fn=loss_fn(module, train=False),
        tx=adamw(optimizer),
        batch=sharding.named(arrays, ("batch", "length")),
        flops_per_token=flops_per_token(module, arrays),
        max_grad_norm=optimizer.max_grad_norm,
    )


def rows(data: PairsData) -> Arrays:
    """Shape and type of each array of a batch."""
    return shapes(data.batch_size, data.source_len, data.target_len)


def init(module: nn.Module, key: PRNGKeyArray) -> Params:
    """The model's parameters, boxed with the names of their axes."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, ids, ids)["params"]


def loss_fn(module: nn.Module, *, train: bool, smoothing: float = 0.0) -> LossFn:
    """The next-token objective of a translation, given the source."""

    def loss(params, extra, batch, rng):
        logits = module.apply(
            {"params": params},
            batch["source"],
            batch["tokens"],
            batch["source_mask"],
            batch["mask"],
            train=train,
            rngs={"dropout": rng},
        )
        value, metrics = next_token_loss(logits, batch["targets"], batch["mask"], smoothing)
        return value, (extra, metrics)

    return loss


def check_fit(pairs: PairsDataset, data: PairsData, config: Any) -> None:
    """Refuses ids outside the model's vocabularies and rows longer than it can place."""
    for name in ("source_vocab_size", "vocab_size"):
        found, room = getattr(pairs, name), getattr(config, name)
        if found > room:
            raise ValueError(
                f"{pairs.name} has ids up to {found - 1}, outside the model's {name} of {room}; "
                f"take --model.{name.replace('_', '-')} {found}"
            )
    room = getattr(config, "max_len", None)
    longest = max(data.source_len, data.target_len)
    if room is not None and longest > room:
        raise ValueError(
            f"rows of {longest} tokens are longer than the model's max_len={room}; take "
            f"--model.max-len {longest}"
        )


def translate(
    module: nn.Module, params: Params, source: jax.Array, source_mask: jax.Array, start: int,
    length: int,
) -> jax.Array:  # fmt: skip
    """The likeliest token after another, [B, length], for a source [B, S]."""
    rows = source.shape[0]
    variables = {"params": params}
    cache = module.apply(variables, source, source_mask, length, method="start")

    def decoder(tokens, positions, cache, mask=None):
        del mask  # a start symbol has no padding beside it
        return module.apply(variables, tokens, positions, cache, method="decode")

    prompt, lengths = jnp.full((rows, 1), start), jnp.ones(rows, jnp.int32)
    key = jax.random.key(0)  # nothing is drawn
    return generate(decoder, cache, prompt, lengths, length, key, LIKELIEST, (start,))


def sampler(
    module: nn.Module, pairs: PairsDataset, target_len: int, *, count: int = 4
) -> Callable[[Params, PRNGKeyArray], str]:
    """Translates the first held-out sources, to be looked at as training goes on."""
    shown = pairs.heldout_pairs[:count]
    batch = {name: x[: len(shown)] for name, x in pairs.heldout(0).items()}
    tokenizer = pairs.target_tokenizer

    @jax.jit
    def translated(params):
        source, mask = jnp.asarray(batch["source"]), jnp.asarray(batch["source_mask"])
        return translate(module, params, source, mask, tokenizer.end_of_text, target_len)

    def sample(params, rng):
        del rng
        new = multihost_utils.process_allgather(translated(params), tiled=True)
        lines = []
        for (source, target), ids in zip(shown, new, strict=True):
            lines += [f"source       {source}", f"reference    {target}"]
            lines += [f"translation  {tokenizer.decode(until(ids, tokenizer.end_of_text))}", ""]
        return "\n".join(lines)

    return sample


def until(ids: np.ndarray, end: int) -> np.ndarray:
    """The ids before the first `end`."""
    found = np.flatnonzero(ids == end)
    return ids[: found[0]] if found.size else ids


def flops_per_token(module: nn.Module, arrays: Arrays) -> int:
    """Of forward and backward, for each token of the target's rows.

    Six for each weight and token that meet (Kaplan et al. 2020, section 2.1). Weights of the
    encoder meet the tokens of the source, all others those of the target; of the tables of words
    only the one that scores meets any. Attention's scores are left out, and what squeezes blocks of
    keys is counted as if it met every token.
    """
    (_, source_len), (_, target_len) = arrays["source"][0], arrays["tokens"][0]
    params = jax.eval_shape(lambda: init(module, jax.random.key(0)))
    weights = {
        path: math.prod(leaf.shape)
        for path, leaf in flatten_dict(nn.meta.unbox(params), sep="/").items()
    }
    tables = {path: weights.pop(path) for path in list(weights) if path.endswith("table")}
    source = sum(n for path, n in weights.items() if path.startswith("encoder/"))
    scoring = tables.get("head/table", tables.get("embed/table", 0))
    target = sum(weights.values()) - source + scoring
    return 6 * (source * source_len // target_len + target)
