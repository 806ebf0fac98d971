"""transformers' Trainer, thinly subclassed, and what a run leaves while it trains."""
