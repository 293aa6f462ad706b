"""Yuan et al. 2025: attention that reads a part of what is behind it, and loses nothing."""

import dataclasses

import numpy as np

from experiments.study import Claim, Study, find, ratio_of_means
from experiments.study.keys_read import share, three_branches
from experiments.study.long_rows import Reader, as_large, native_sparse_model
from lineage_jax.kernels import NSAConfig
from lineage_jax.models import llama

SEQ_LEN = 1024
SPARSE = NSAConfig(
    compressed_size=16, stride=16, block_size=16, num_blocks=4, num_first=1, num_local=1, window=32
)


def claim(study: Study) -> Claim:
    """Yuan et al. 2025, figure 4: trained from scratch, the same updates.

    Three branches and what squeezes blocks are half as many parameters again: full attention has
    them in its feed-forward layers.
    """
    study = dataclasses.replace(study, num_seeds=3, num_updates=600)
    sparse = native_sparse_model(SPARSE, SEQ_LEN, compression_dim=4)
    compared = [
        Reader(name="full", module=llama.Llama(as_large(sparse.config))),
        Reader(name="sparse", module=sparse),
    ]

    def findings(full, sparse):
        read = share(three_branches(SPARSE, SEQ_LEN))
        return [
            find(
                "held-out loss, sparse / full",
                ratio_of_means,
                sparse["loss"],
                full["loss"],
                wanted=(None, 1.01),
            ),
            find(
                "keys that are read, all branches counted, of those that full attention reads",
                lambda part: part.mean(-1),
                np.full(len(study.seeds), read),
                wanted=(None, 0.25),
            ),
        ]

    return study.claim(
        "sparse_for_full",
        compared,
        findings,
        milestone="native_sparse",
        statement="a model trained with native sparse attention has no higher loss than one with "
        "full attention",
        where="Yuan et al. 2025, figure 4",
        criterion="held-out loss at most 1.01 times that of full attention after as many updates, "
        "its interval too, and at most 25 % of the keys read",
        setting=f"bytes of Python's standard library in rows of {SEQ_LEN}, one in a batch; two "
        "layers of 32, two heads that share keys and values; blocks of 16, each squeezed into one "
        "key or read whole, of these the first, the query's own and two more; a window of 32; full "
        "attention's feed-forward layers are wider, so that it has as many parameters; keys are "
        "counted over all queries of a row; the learning rate of each arm is the best of a grid on "
        "a seed that is not counted",
    )
