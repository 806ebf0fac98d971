"""transformers' Trainer, thinly subclassed, the ways to spread it over GPUs, and what a run leaves while it trains."""

import logging
import os

import torch

# What optional libraries say when others find them installed, and no user can change: torchao of PyTorch's enums...
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())
# ...and DeepSpeed of a missing GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
