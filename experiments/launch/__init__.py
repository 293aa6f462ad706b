"""From a scaling fit to a run: `lineage launch FIT.json --flops 1e24 --chip v5p`.

The fit says how many parameters and tokens are best for the compute; the nearest shape of a family
becomes an experiment; the compiler says which slice holds it, on which mesh, and how fast it is.

options   what is asked
sizes     an experiment whose model has so many parameters
slices    the slice and the mesh
find      the run: all of these together
answer    it, as lines, JSON and a command
"""

from experiments.launch.answer import Launch
from experiments.launch.find import launch, launch_file
from experiments.launch.options import LaunchOptions

__all__ = ["Launch", "LaunchOptions", "launch", "launch_file"]
