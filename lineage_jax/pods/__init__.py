"""Machines you do not have: the step that `train` runs, compiled for a slice of TPUs and predicted.

topologies   "v5p:8x8x8" as devices and a mesh
aot          the real step, compiled by the real compiler, in a process of its own
bundles      the schedule of a Pallas kernel, in instructions
regions      its loops and branches
hlo          the text that the compiler leaves
network      what a collective sends, and how long the torus takes
cost         a walk through the schedule
roofline     what the walk counts by itself
memory       what layers leave for the backward pass
plan         all of it, as a table
search       the fastest mesh, and the smallest slice
"""

from lineage_jax.pods.aot import Compiled, DoesNotFitError, Request, compile_step
from lineage_jax.pods.chips import CHIPS, SLICES, Chip
from lineage_jax.pods.plan import Plan, make_plan, make_sketch, predict
from lineage_jax.pods.topologies import Topology

__all__ = [
    "CHIPS",
    "SLICES",
    "Chip",
    "Compiled",
    "DoesNotFitError",
    "Plan",
    "Request",
    "Topology",
    "compile_step",
    "make_plan",
    "make_sketch",
    "predict",
]
