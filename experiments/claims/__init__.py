"""One claim, one file: what a paper says, and the comparison that would show it false."""
