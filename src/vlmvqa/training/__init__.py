"""transformers' Trainer, thinly subclassed, the ways to spread it over GPUs, and what a run leaves while it trains."""

import os

import torch

# DeepSpeed warns of a missing GPU when it is only imported, and no user can change that.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
