"""Cached features of a frozen vision encoder."""
