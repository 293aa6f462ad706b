"""One file per milestone, which trains it; what its paper is known for is in `claims`."""
