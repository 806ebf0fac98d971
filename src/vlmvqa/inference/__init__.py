"""Generating answers and scoring them, with the control baselines."""
