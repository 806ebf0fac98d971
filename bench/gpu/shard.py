"""Process groups, and FSDP2 without `training/distributed.py`, which imports the config."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vlmvqa.models.vlm import VLM

TIMEOUT = timedelta(minutes=2)


def join(device: torch.device) -> None:
    """Join torchrun's process group, or create one of this process alone."""
    if dist.is_initialized():
        return
    cuda = device.type == "cuda"
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    else:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def shard(model: VLM, device: torch.device, dtype: torch.dtype, fast: bool = False) -> None:
    """Apply FSDP2 as `training/distributed.py` does: a unit per block, gradients reduced in fp32.

    Args:
        fast: as `dist.reduce_dtype=bfloat16 dist.keep_gathered=true`, with a unit for the embedding.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype if fast else torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=not fast)
    uncast = replace(precision, cast_forward_inputs=False)
    if fast:
        fully_shard(model.get_input_embeddings(), mesh=mesh, mp_policy=uncast, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=uncast)
    model.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
