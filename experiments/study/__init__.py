"""How the claims in `experiments/claims` are measured."""

from experiments.study.claim import (
    Claim,
    Finding,
    bootstrap,
    count,
    find,
    mean_difference,
    ratio_of_means,
)
from experiments.study.study import Arm, Study
from experiments.study.table import RESULTS, markdown_table, read_claims
from experiments.study.training import Recipe, train

__all__ = [
    "RESULTS",
    "Arm",
    "Claim",
    "Finding",
    "Recipe",
    "Study",
    "bootstrap",
    "count",
    "find",
    "markdown_table",
    "mean_difference",
    "ratio_of_means",
    "read_claims",
    "train",
]
