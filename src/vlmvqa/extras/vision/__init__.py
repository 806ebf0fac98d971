"""Optional parts of the vision encoder and its input."""
