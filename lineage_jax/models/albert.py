"""ALBERT: BERT with a tenth of the parameters, for all layers are one, and the tables are narrow.

Paper:       Lan et al. 2019, "ALBERT: A Lite BERT for Self-supervised Learning of Language
             Representations", section 3 and table 1. https://arxiv.org/abs/1909.11942
Builds on:   bert.py, whose block it repeats and whose heads it has.
What is new: tables E wide and a linear map to the H of the blocks, V E + E H parameters for V H
             (section 3.1, factorized embeddings); one block applied L times (cross-layer parameter
             sharing); of two sentences side by side, which came first (sentence-order prediction,
             `lineage_jax.data.masking`) where BERT asked whether they are side by side.
Departures:  all parameters of a block are shared; table 4's other ways to share are not here. Our
             masks leave out tokens one by one, not up to three in a row (section 4.1).
"""

import dataclasses

from flax import linen as nn

from lineage_jax.models.bert import Activation, Bert, BertConfig, Block, linear
from lineage_jax.nn import Mask
from lineage_jax.nn.stack import POLICIES
from lineage_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlbertConfig(BertConfig):
    """What must be chosen to build one ALBERT."""

    table_dim: int = 128  # E
    """Width of the tables of tokens, positions and types (table 1)."""
    activation: Activation = "gelu_tanh"
    """As in the released models (version 2)."""

    def __post_init__(self):
        super().__post_init__()
        if self.table_dim < 1:
            raise ValueError(f"table_dim must be at least 1, got {self.table_dim}")


def albert_base() -> AlbertConfig:
    """Lan et al. 2019, table 1: printed as 12 M parameters."""
    return albert(num_layers=12, embed_dim=768, num_heads=12)


def albert_large() -> AlbertConfig:
    """Lan et al. 2019, table 1: printed as 18 M parameters."""
    return albert(num_layers=24, embed_dim=1024, num_heads=16)


def albert_xlarge() -> AlbertConfig:
    """Lan et al. 2019, table 1: printed as 60 M parameters; 16 heads as released."""
    return albert(num_layers=24, embed_dim=2048, num_heads=16)


def albert_xxlarge() -> AlbertConfig:
    """Lan et al. 2019, table 1: printed as 235 M parameters, 223 M as released."""
    return albert(num_layers=12, embed_dim=4096, num_heads=64)


def albert(*, num_layers: int, embed_dim: int, num_heads: int) -> AlbertConfig:
    """A row of table 1: E = 128, V = 30,000 (section 4.1), no dropout (section 4.8)."""
    return AlbertConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        vocab_size=30_000,
        max_len=512,
    )


class Albert(Bert):
    """BERT's encoder with narrow tables and one block for all layers."""

    config: AlbertConfig

    def table_dim(self) -> int:
        """Width of the tables, E."""
        return self.config.table_dim

    def run_blocks(
        self, x: Float[Array, "B T M"], reads: Mask, train: bool
    ) -> Float[Array, "B T D"]:
        """The embeddings, widened, through one block again and again."""
        c = self.config
        x = linear(c, c.table_dim, c.embed_dim, "mlp", "widen")(x)  # B T D
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=POLICIES[c.remat], prevent_cse=False)
        repeated = nn.scan(
            block,
            variable_broadcast="params",
            variable_axes={"intermediates": 0},
            split_rngs={"params": False, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=c.unroll,
        )
        return repeated(c, train, name="block")(x, reads, None)[0]
