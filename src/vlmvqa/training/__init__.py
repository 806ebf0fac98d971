"""Training: transformers' Trainer extended for VLMs, distribution over GPUs, checkpoints and logs."""

import os

import torch

# Otherwise importing DeepSpeed warns about a missing GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
