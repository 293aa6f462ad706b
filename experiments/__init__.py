"""One file per milestone: what trains it, and the claim of its paper, measured."""
