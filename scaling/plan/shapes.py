"""A ladder of GPT shapes, from which the sizes of a sweep are taken."""

import math
from dataclasses import asdict, dataclass

from lineage_jax.models.gpt import GPTConfig
from lineage_jax.typing import Precision
from scaling import flops


@dataclass(frozen=True)
class Shape:
    """A GPT by its layers, width and heads."""

    num_layers: int
    embed_dim: int
    num_heads: int

    def __post_init__(self):
        if min(self.num_layers, self.embed_dim, self.num_heads) < 1:
            raise ValueError(f"layers, width and heads must be at least 1, got {self}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim, got {self.num_heads} and {self.embed_dim}"
            )

    @property
    def name(self) -> str:
        """Layers x width, as in the tables of a sweep."""
        return f"{self.num_layers}x{self.embed_dim}"

    @property
    def non_embedding(self) -> int:
        """Parameters as Kaplan et al. 2020 count them: `gpt.num_params`, in closed form.

        12 D^2 weights, 9 D biases and 4 D of norms in each layer; 2 D of the last norm.
        """
        d = self.embed_dim
        return self.num_layers * (12 * d * d + 13 * d) + 2 * d

    def params(self, vocab_size: int, seq_len: int) -> int:
        """Parameters with the tables of tokens and positions."""
        return self.non_embedding + (vocab_size + seq_len) * self.embed_dim

    def config(self, vocab_size: int, seq_len: int, dtype: Precision = "float32") -> GPTConfig:
        """The model of this shape on rows of `seq_len` tokens."""
        return GPTConfig(**asdict(self), vocab_size=vocab_size, max_len=seq_len, dtype=dtype)

    def flops_per_token(self, vocab_size: int, seq_len: int) -> int:
        """Of forward and backward, counted by `scaling.flops`."""
        return flops.gpt(self.config(vocab_size, seq_len), seq_len).train()


def ladder() -> tuple[Shape, ...]:
    """Shapes of 16 to 12288 wide, each of 1.3 to 2.1 times the parameters of the one before.

    Three widths to a doubling, four from 128 up, most of GPT-2's and GPT-3's among them, with
    `depth` layers. Heads are 64 wide, as in GPT-3's table up to 350M; below a width of 256 they are
    narrower, down to 8, so that most models have four or more and widths go up in small steps.
    """
    quarters = [(k, m) for k in range(5, 14) for m in (4, 5, 6, 7) if m < 7 or k >= 7]
    shapes = []
    for width in [16, 24, *(2**k * m // 4 for k, m in quarters)]:
        head = min(64, max(8, 2 ** (width.bit_length() - 3)))
        shapes.append(Shape(max(2, round(depth(width))), width, width // head))
    return tuple(shape for shape in shapes if shape.embed_dim <= 12288)


def depth(width: int) -> float:
    """Layers of a model of that width, as in Brown et al. 2020, table 2.1.

    One for each 64 of width, for 128 from 4096 up, and between them for 2 sqrt(width); the table's
    350M is deeper. LLaMA's (Touvron et al. 2023, table 2) have up to a quarter more.
    """
    return width / min(128.0, max(64.0, 2 * math.sqrt(width)))
