"""Parameters laid out for decoding, where each weight is read once for every token."""

from typing import Any

from lineage_jax.nn.embed import COLUMNS
from lineage_jax.nn.stack import apart
from lineage_jax.typing import Params


def for_decoding(params: Params) -> Params:
    """The same parameters as one token at a time reads them fastest on a CPU.

    Layers are taken apart, and the table that scores the vocabulary is there once more with a
    column for each token: its product with one vector is then as fast as memory is read.
    (`experiments/benchmarks/decoding.py` measures both.) Modules take either layout.

    Args:
      params: of a model whose stacks of layers are called "blocks", and whose table of scores is
        "head" or, where it is that of the tokens too, "embed".
    """
    laid: dict[str, Any] = dict(apart(params))
    scores = "head" if "head" in laid else "embed"
    table = laid.get(scores, {})
    if "table" in table:
        laid[scores] = {**table, COLUMNS: table["table"].T}
    return laid
