"""Rows of tokens, who may see whom in them, and the loss. Imports nothing else of the project."""
