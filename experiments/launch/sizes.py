"""An experiment whose model has so many parameters: the family's shape that comes nearest."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from experiments import gpt as gpt_experiment
from experiments import llama as llama_experiment
from lineage_jax.models import gpt, llama
from scaling.plan import depth

Count = Literal["total", "non_embedding"]
"""Parameters as Chinchilla's law counts them, or as Kaplan's do."""

WIDTHS = tuple(
    w for k in range(7, 16) for w in (2**k * m // 4 for m in (4, 5, 6, 7)) if not w % 128
)
"""Four to a doubling, as in `scaling.plan.ladder`, and multiples of 128: a TPU's matrix unit."""

WEIGHTS = 12
"""Of a layer, over the square of its width (Kaplan et al. 2020, table 1); a LLaMA's are as many."""

ODD = 4
"""Times the depth of the family, or a part of it, past which a model is no longer of its kind; the
loss hardly feels less (Kaplan et al. 2020, section 3.1 and figure 5)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one paper, of any size.

    Attributes:
      presets: of its experiment; `preset` is the one whose other settings are kept.
      config: a model from num_layers=, embed_dim= and num_heads=.
      num_params: of a config, by `Count`.
      tables: matrices of vocabulary by width.
    """

    presets: Mapping[str, Callable[[], Any]]
    preset: str
    config: Callable[..., Any]
    num_params: Callable[[Any], dict[str, int]]
    tables: int

    def experiment(
        self,
        params: float,
        *,
        count: Count = "total",
        seq_len: int | None = None,
        vocab_size: int | None = None,
    ) -> Any:
        """The preset's experiment with a model of about `params` parameters.

        Args:
          params: N, counted as `count` says.
          count: what N counts.
          seq_len: tokens in a row; the preset's, if not given.
          vocab_size: of the model; the preset's, if not given.

        Raises:
          ValueError: if the family has nothing so small or so large.
        """
        start = self.presets[self.preset]()
        length = seq_len or start.data.seq_len
        sizes = {"max_len": length, "vocab_size": vocab_size or start.model.vocab_size}

        def model(num_layers: int, width: int) -> Any:
            heads = width // (128 if width >= 2048 else 64)  # 128: Brown et al. 2020, from 1.3B up
            shape = self.config(num_layers=num_layers, embed_dim=width, num_heads=heads)
            return dataclasses.replace(shape, **sizes)

        def layers(width: int) -> float:
            tables = self.tables * sizes["vocab_size"] if count == "total" else 0
            return (params - tables * width) / (WEIGHTS * width**2)

        def oddness(width: int) -> float:
            """How far its depth would be from the family's, as a factor."""
            ratio = max(layers(width), 1e-9) / depth(width)
            return max(ratio, 1 / ratio)

        width = min(WIDTHS, key=oddness)
        one, two = (self.num_params(model(n, width))[count] for n in (1, 2))
        num_layers = 1 + round((params - one) / (two - one))
        if num_layers < 1 or oddness(width) > ODD:
            raise ValueError(
                f"no shape of about {params:.3g} parameters with a vocabulary of "
                f"{sizes['vocab_size']:,}: the nearest is {width} wide, {num_layers} deep; take "
                "other --flops, or another --vocab-size"
            )
        config = model(num_layers, width)
        data = dataclasses.replace(start.data, seq_len=length, vocab_size=config.vocab_size)
        return dataclasses.replace(start, model=config, data=data)


def _gpt(*, num_layers: int, embed_dim: int, num_heads: int) -> gpt.GPTConfig:
    return gpt.gpt3(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=embed_dim // num_heads,
    )


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        presets=llama_experiment.PRESETS,
        preset="llama_7b",
        config=llama.llama,
        num_params=llama.num_params,
        tables=2,
    ),
    "gpt": Family(
        presets=gpt_experiment.PRESETS,
        preset="gpt3_6_7b",
        config=_gpt,
        num_params=gpt.num_params,
        tables=1,
    ),
}
"""By the name of the milestone."""
