"""Objectives: arrays in, scalar out. No parameters, no model."""
