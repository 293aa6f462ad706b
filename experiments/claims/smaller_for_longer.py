"""Touvron et al. 2023: a smaller model that is trained for longer is as good, and cheaper."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.study import Claim, Study, find, mean_difference, train
from experiments.study.text import OPTIMIZER, heldout_loss, recipe
from lineage_jax.data.packing import Batches
from lineage_jax.data.text import TextData, TextDataset, load_text
from lineage_jax.models import llama
from lineage_jax.nn import Attention, Embed, KVCache, Linear, Mask, RMSNorm, decoder_mask, rotate
from lineage_jax.nn import stack as stacked
from lineage_jax.train.metrics import config_json
from lineage_jax.typing import Array, Float, Int, Params

WIDTH, SEQ_LEN, BATCH_SIZE = 32, 128, 16
NUM_UPDATES = 440  # of 2048 bytes: 20 for each of 45,000 parameters (Hoffmann et al. 2022, table 3)
SHIFT = 64  # tokens
WHOLE = llama.LlamaConfig(
    num_layers=4,
    embed_dim=WIDTH,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=84,  # even, so that GELU's is whole; table 2's are 2/3 of 4 embed_dim
    vocab_size=257,
    max_len=2 * SEQ_LEN,
    tied_embeddings=True,  # or the tables would be most of the parameters
    init_std=1 / math.sqrt(WIDTH),  # with 0.02, meant for 768, so few updates are too few
)


def claim(study: Study) -> Claim:
    """Touvron et al. 2023, section 1 and figure 1: half the layers, four times the tokens.

    And three of the parts that LLaMA is made of: SwiGLU against GELU of as many parameters,
    rotations that know distances alone, and a cache that is smaller where heads share keys.
    """
    study = dataclasses.replace(study, num_seeds=3, num_updates=NUM_UPDATES)
    half = dataclasses.replace(WHOLE, num_layers=WHOLE.num_layers // 2)
    compared = [
        Reader(name="whole", module=llama.Llama(WHOLE)),
        Reader(name="half-for-longer", module=llama.Llama(half), longer=4),
        Reader(name="gelu", module=GeluLlama(WHOLE)),
    ]

    def findings(whole, half, gelu):
        ratio = WHOLE.num_heads / WHOLE.num_kv_heads
        return [
            find(
                "held-out loss, half for longer - whole, nats per byte",
                mean_difference,
                half["loss"],
                whole["loss"],
                wanted=(None, 0.0),
            ),
            find(
                "held-out loss, SwiGLU - GELU, nats per byte",
                mean_difference,
                whole["loss"],
                gelu["loss"],
                wanted=(None, 0.0),
            ),
            find(
                f"largest change of a logit when all stand {SHIFT} places on, of the largest logit",
                lambda error: error.max(-1),
                whole["shift_error"],
                wanted=(None, 1e-5),
            ),
            find(
                "bytes of the cache, a head of keys for each of queries / shared",
                lambda ratio: ratio.mean(-1),
                whole["cache_ratio"],
                wanted=(ratio, ratio),
            ),
        ]

    return study.claim(
        "smaller_for_longer",
        compared,
        findings,
        milestone="llama",
        statement="a smaller model that is trained for longer is as good as a larger one, and "
        "cheaper to use",
        where="Touvron et al. 2023, section 1; Touvron et al. 2023 (Llama 2), appendix A.2.1",
        criterion="held-out loss of half the layers after four times the tokens at most that of "
        "the whole, and SwiGLU's at most GELU's, intervals too; logits change by at most 1e-5 of "
        "the largest when all positions shift; the cache is smaller by H / G exactly",
        setting="bytes of Python's standard library; four layers of 32, 45,000 parameters without "
        "the table, 20 bytes for each; four heads of queries, two of keys and values; GELU's layer "
        "is 3/2 as wide; the learning rate of each arm is the best of a grid on a seed that is not "
        "counted",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """A language model that reads `longer` times as many batches; they begin with the same."""

    name: str
    module: Any
    longer: int = 1

    def setting(self) -> Mapping[str, Any]:
        """All that its numbers depend on but seed, rate and updates."""
        return {
            "model": f"{type(self.module).__name__} {config_json(self.module.config)}",
            "times the updates": self.longer,
            "data": text().train.stream.digest,
            "optimizer": config_json(OPTIMIZER),
        }

    def run(self, *, seed: int, learning_rate: float, updates: int) -> Mapping[str, float]:
        """Trains from `seed`; the held-out loss, and what the parts promise."""
        read, config = text(), self.module.config
        batches = Batches(read.train.stream, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=seed)
        params = train(
            recipe(self.module),
            batches.stack,
            seed=seed,
            peak=learning_rate,
            updates=updates * self.longer,
        )
        full = dataclasses.replace(config, num_kv_heads=config.num_heads)
        return {
            "loss": heldout_loss(self.module, params, read.heldout),
            "shift_error": shift_error(self.module, params, read.heldout(0)["tokens"]),
            "cache_ratio": cache_bytes(full) / cache_bytes(config),
        }


@functools.cache
def text() -> TextDataset:
    """Bytes of the standard library, a hundredth of its modules held out."""
    return load_text(TextData(seq_len=SEQ_LEN, batch_size=BATCH_SIZE, heldout_fraction=0.01))


@functools.cache
def at_places(module: Any) -> Any:
    """Logits of rows whose first token stands at a place."""

    def logits(params, tokens, first):
        places = first + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return module.apply({"params": params}, tokens, places)[0]

    return jax.jit(logits)


def shift_error(module: Any, params: Params, tokens: Int[np.ndarray, "B T"]) -> float:
    """The largest change of a logit when all positions shift, as a part of the largest logit."""
    here, there = (np.asarray(at_places(module)(params, tokens, at)) for at in (0, SHIFT))
    return float(np.abs(there - here).max() / np.abs(here).max())


def cache_bytes(config: llama.LlamaConfig) -> int:
    """Of the keys and values of one sequence."""
    cache = jax.eval_shape(lambda: llama.empty_cache(config, 1, config.max_len))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


class GeluBlock(nn.Module):
    """LLaMA's block with a plain layer of GELU, 3/2 as wide: two matrices for three."""

    config: llama.LlamaConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], shared: tuple[Int[Array, "#B T"], Mask], per_layer: None
    ) -> tuple[Float[Array, "B T D"], None]:
        c, (positions, mask) = self.config, shared
        norm = functools.partial(RMSNorm, c.norm_epsilon)
        out_std = c.init_std / math.sqrt(2 * c.num_layers)
        attention = Attention(
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=llama.head_dim(c),
            stddev=c.init_std,
            out_stddev=out_std,
            use_bias=False,
            place=functools.partial(rotate, base=c.rope_base),
            name="attention",
        )
        width, wide = (c.embed_dim,), (3 * c.mlp_dim // 2,)
        linear = functools.partial(Linear, use_bias=False)
        up = linear(width, wide, ("embed", "mlp"), c.init_std, name="up")
        down = linear(wide, width, ("mlp", "embed"), out_std, name="down")
        x = x + attention(norm(name="attention_norm")(x), mask, positions, None)[0]
        return x + down(nn.gelu(up(norm(name="mlp_norm")(x)))), None


class GeluLlama(nn.Module):
    """LLaMA with `GeluBlock`s."""

    config: llama.LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T V"], None]:
        c = self.config
        positions, reads = decoder_mask(
            tokens.shape[1], c.max_len, positions, segment_ids, cache, None
        )
        embed = Embed(c.vocab_size, c.embed_dim, "vocab", c.init_std, name="embed")
        blocks = stacked(GeluBlock, c.num_layers)(c, name="blocks")
        x, _ = blocks(embed(tokens), (positions, reads), None)
        return embed.attend(RMSNorm(c.norm_epsilon, name="final_norm")(x)), None
