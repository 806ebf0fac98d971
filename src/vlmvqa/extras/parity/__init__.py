"""Comparison of a model's halves with the libraries they come from, on the user's own weights."""
