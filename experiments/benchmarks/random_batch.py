"""A batch that any experiment's program reads, of random tokens: what is timed and compared."""

from typing import Any

import numpy as np


def random_batch(experiment: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of tokens, of which a part counts in the loss.

    Rows of text are two documents each; sources end in padding.
    """
    rng, model = np.random.default_rng(seed), experiment.model
    sizes = {
        "tokens": model.vocab_size,
        "targets": model.vocab_size,
        "source": getattr(model, "source_vocab_size", model.vocab_size),
        "types": 2,
        "label": 2,
    }
    batch = {name: box.value for name, box in experiment.program().batch.items()}
    rows, length = batch["tokens"].shape
    cuts = rng.integers(1, length, (rows, 1))

    def made(name: str, shape: tuple[int, ...]) -> np.ndarray:
        at = np.arange(shape[-1])[None]
        if name in sizes:
            return rng.integers(0, sizes[name], shape, np.int32)
        if name == "positions":
            return np.where(at < cuts, at, at - cuts)
        if name == "segment_ids":
            return at >= cuts
        if name == "source_mask":
            return at < rng.integers(1, shape[-1] + 1, (rows, 1))
        return rng.random(shape) < 0.9

    return {name: made(name, array.shape).astype(array.dtype) for name, array in batch.items()}
