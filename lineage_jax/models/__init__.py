"""The milestones: one paper, one file, read from top to bottom."""
