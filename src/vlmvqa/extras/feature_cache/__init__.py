"""Cached outputs of a frozen vision encoder."""
