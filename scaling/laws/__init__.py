"""Scaling laws, each one small differentiable function with its source.

A law maps the columns of a runs table to a loss in nats per token, or to what that loss is worth
on a task. It is written in jnp, in the natural parameters of its paper. To add a law, write its
function, say where fits should start, and put the `Law` in `LAWS`: fitting, intervals, certificates
and reports then follow.

Starting points are expressed through the centre of the data (geometric means of N and D, median
loss), never in absolute numbers, so that parameters counted in millions start as well as in units.
"""

from scaling.laws.annealing import LR_ANNEALING
from scaling.laws.chinchilla import (
    CHINCHILLA,
    CHINCHILLA_FIXED_E,
    CHINCHILLA_TIED,
    DATA_CONSTRAINED,
    OVERTRAINING,
)
from scaling.laws.downstream import DOWNSTREAM_SIGMOID
from scaling.laws.floor import BROKEN_POWER_LAW, SATURATING
from scaling.laws.kaplan import KAPLAN_C, KAPLAN_D, KAPLAN_N, KAPLAN_ND
from scaling.laws.law import Law, Parameter, evaluate

__all__ = ["LAWS", "Law", "Parameter", "evaluate"]

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        KAPLAN_N,
        KAPLAN_D,
        KAPLAN_C,
        KAPLAN_ND,
        CHINCHILLA,
        CHINCHILLA_TIED,
        CHINCHILLA_FIXED_E,
        OVERTRAINING,
        DATA_CONSTRAINED,
        SATURATING,
        BROKEN_POWER_LAW,
        LR_ANNEALING,
        DOWNSTREAM_SIGMOID,
    )
}
