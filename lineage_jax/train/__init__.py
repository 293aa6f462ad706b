"""Training: the state, one step, the loop around it, and what they write down."""
