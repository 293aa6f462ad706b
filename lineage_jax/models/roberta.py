"""RoBERTa: BERT with more of everything but sentence pairs: text, steps, batch, and other masks.

Paper:       Liu et al. 2019, "RoBERTa: A Robustly Optimized BERT Pretraining Approach", sections 4
             and 5, appendix A. https://arxiv.org/abs/1907.11692
Builds on:   bert.py, whose blocks and heads it has.
What is new: no next-sentence objective (section 4.2), masks drawn anew each time a text is met
             (section 4.1; `lineage_jax.data.masking`), bytes for characters (section 4.4).
Departures:  positions are counted as in the released models, over what is not padding, from the
             id of padding on; the paper does not say so. Our rows hold one document each
             (DOC-SENTENCES in table 2), where its final runs let them cross.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from lineage_jax.models.bert import Bert, BertConfig, MaskedLM, bert_base, bert_large
from lineage_jax.typing import Array, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """What must be chosen to build one RoBERTa."""

    num_types: int = 1
    """One, whose row is part of every embedding: there is no sentence B (section 4.2)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in each norm, as in the released models."""
    padding_id: int = 1
    """Token that fills up a row, as in the released vocabulary; the row of its position, too."""

    def __post_init__(self):
        super().__post_init__()
        if self.padding_id < 0:
            raise ValueError(f"padding_id must be at least 0, got {self.padding_id}")

    @property
    def num_positions(self) -> int:
        """Rows of the table of positions: those up to padding's, then one for each token."""
        return self.padding_id + 1 + self.max_len


def roberta_base() -> RobertaConfig:
    """Liu et al. 2019, table 9, second column: 125 M parameters as released."""
    return roberta(bert_base())


def roberta_large() -> RobertaConfig:
    """Liu et al. 2019, table 9, first column: printed as 355 M parameters (section 5)."""
    return roberta(bert_large())


def roberta(size: BertConfig) -> RobertaConfig:
    """A size of BERT with RoBERTa's vocabulary, as released."""
    return RobertaConfig(
        num_layers=size.num_layers,
        embed_dim=size.embed_dim,
        num_heads=size.num_heads,
        vocab_size=50_265,
        max_len=512,
        dropout_rate=0.1,
    )


class Roberta(Bert):
    """BERT's encoder, its positions counted from the id of padding on."""

    config: RobertaConfig

    def positions(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """padding_id + 1 for the first token that is not padding, and so on; padding_id for it."""
        real = (tokens != self.config.padding_id).astype(jnp.int32)
        return self.config.padding_id + real * jnp.cumsum(real, axis=1)


def masked_lm(config: RobertaConfig) -> nn.Module:
    """The model that is pre-trained. The released head has the exact GELU, whatever the blocks."""
    return MaskedLM(Roberta(config), activation="gelu")
