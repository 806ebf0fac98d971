"""Distribution of a model over processes: DDP, FSDP2 or DeepSpeed ZeRO. The model itself has no code for it.

strategy  parameters   gradients    optimizer states   implementation
ddp       replicated   replicated   replicated         PyTorch's DistributedDataParallel
fsdp      sharded      sharded      sharded            PyTorch's fully_shard, a unit per transformer block
zero1     replicated   replicated   sharded            DeepSpeed
zero2     replicated   sharded      sharded            DeepSpeed
zero3     sharded      sharded      sharded            DeepSpeed

FSDP2 is applied here and not through accelerate, which silently trains under DDP on a machine without a GPU.
"""

from __future__ import annotations

import os
import socket
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError, counted
from vlmvqa.models.interface import Model
from vlmvqa.ranks import ACCELERATES


def start(settings: DistSettings, cpu: bool) -> None:
    """Join the process group described by the launcher's environment.

    Without a launcher, create a group of one process if the strategy needs a group. Does nothing in a group.

    Args:
        cpu: train on the CPU although there is a GPU.

    Raises:
        InputError: more processes than GPUs were started on this machine, or not all ranks appeared.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        if settings.strategy == "ddp":
            return
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    gpu = torch.cuda.is_available() and not cpu
    if gpu:
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        started = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", local_rank + 1)))
        if started > gpus:
            raise InputError(f"{started} processes were started on a machine with {counted(gpus, 'GPU')}; start {gpus}")
        torch.cuda.set_device(local_rank)
    # Longer than that of StopHandler, which names the missing ranks.
    timeout = timedelta(minutes=settings.timeout_minutes + 2)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from vlmvqa.training.rendezvous import rendezvous

        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = rendezvous(rank, world, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    # accelerate divides the cores among this machine's ranks, and warns about it.
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    for name in [name for name in os.environ if name.startswith(ACCELERATES)]:
        del os.environ[name]  # `ranks.launcher_choice` has read them; accelerate would wrap the model a second time
    if settings.is_zero:
        from vlmvqa.training import zero

        zero.silence()


def shard(model: Model, device: torch.device, dtype: torch.dtype | None, settings: DistSettings) -> None:
    """Apply FSDP2 in place: one unit per encoder block and decoder layer, and one for the rest.

    The embedding has a unit of its own if gradients are reduced in the data type that they are computed in.

    Args:
        dtype: compute dtype, where it differs from the weights'; gradients are then reduced in fp32, unless
            `settings.reduce_dtype` is bfloat16.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    reduced = torch.bfloat16 if settings.reduce_dtype == "bfloat16" else torch.float32 if dtype else None
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.offload else OffloadPolicy()
    apply = partial(fully_shard, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for block in model.blocks:
        apply(block, reshard_after_forward=not settings.keep_gathered)
    # Inputs outside the blocks aren't cast: in bfloat16 the number of supervised tokens would lose its last digits.
    uncast = replace(precision, cast_forward_inputs=False)
    if reduced == dtype:
        # Apart from the rest, the embedding is gathered while the encoder computes. A tied output head uses its weight
        # outside the embedding's forward pass, so it stays gathered until the end of the backward pass; its gradient,
        # the sum of both uses, is reduced then. If gradients are reduced in a wider data type, FSDP2 would keep the
        # head's in that type during the backward pass: 1.2 GB more for Gemma 2. In the root unit it doesn't.
        embedding = model.get_input_embeddings()
        apply([embedding, *heads_tied_to(model, embedding)], mp_policy=uncast, reshard_after_forward=False)
    apply(model, mp_policy=uncast)
    # The root's parameters are used at the start and the end of the forward pass, so they stay gathered in between.
    model.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]


def heads_tied_to(model: Model, embedding: nn.Module) -> list[nn.Module]:
    """Return the other modules that hold a parameter of the embedding: FSDP2 wants all of them in one unit."""
    own = {id(parameter) for parameter in embedding.parameters()}
    inside = {id(module) for module in embedding.modules()}
    return [
        module
        for module in model.modules()
        if id(module) not in inside and any(id(parameter) in own for parameter in module._parameters.values())
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
