"""What `lineage launch` is asked."""

import dataclasses
import math
from typing import Literal

from experiments.launch.sizes import Count
from lineage_jax.pods import CHIPS, Topology
from scaling.commands import OptimalOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions(OptimalOptions):
    """What to train, and on what."""

    chip: str | None = None
    """v4, v5e, v5p, v6e or tpu7x: the smallest slice of them is found that holds the step."""
    topology: str | None = None
    """This slice instead, such as v5p:8x8x8."""
    days: float | None = None
    """With --chip: the smallest slice that is done in so many days."""
    experiment: Literal["llama", "gpt"] = "llama"
    """The family of the model; its other settings are those of its preset of 7B."""
    count: Count = "total"
    """What the fit's N counts: all parameters, or those without embeddings, as Kaplan's laws do."""
    seq_len: int | None = None
    """Tokens in a row; if not given, the preset's 2048."""
    batch_tokens: int | None = None
    """Tokens in a step; if not given, by DeepSeek-AI's rule, in a power of two of rows."""
    vocab_size: int | None = None
    """Of the model; if not given, of the released ones."""
    data_path: str | None = None
    """The text, as --data.path of lineage train."""

    def __post_init__(self):
        super().__post_init__()
        if (self.chip is None) == (self.topology is None):
            raise ValueError("wanted --chip, such as v5p, or --topology, such as v5p:8x8x8")
        if self.chip is not None and self.chip not in CHIPS:
            raise ValueError(f"--chip: wanted one of {', '.join(CHIPS)}, got {self.chip!r}")
        if self.topology is not None:
            Topology.parse(self.topology)
            if self.days is not None:
                raise ValueError("--days finds the slice: wanted --chip with it, not --topology")
        for name in ("days", "seq_len", "batch_tokens", "vocab_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: wanted a positive number, got {value}")
