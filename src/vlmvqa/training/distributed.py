"""Distribution of a model over processes: DDP, FSDP2 or DeepSpeed ZeRO. The model itself has no code for it.

strategy  parameters   gradients    optimizer states   implementation
ddp       replicated   replicated   replicated         PyTorch's DistributedDataParallel
fsdp      sharded      sharded      sharded            PyTorch's fully_shard, one unit per transformer block
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

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError, counted
from vlmvqa.models.interface import Model
from vlmvqa.ranks import ACCELERATES


def start(settings: DistSettings, cpu: bool) -> None:
    """Join the process group described by the launcher's environment.

    Without a launcher, create a group of one process if the strategy needs a group.

    Args:
        cpu: train on the CPU although there is a GPU.

    Raises:
        InputError: more processes than GPUs were started on this machine, or not all ranks appeared.
    """
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


def shard(model: Model, device: torch.device, dtype: torch.dtype | None, offload: bool) -> None:
    """Apply FSDP2 in place: one unit per encoder block and decoder layer, and one for the rest.

    Args:
        dtype: compute dtype, where it differs from the weights'; gradients are reduced in fp32 in any case.
        offload: keep the shards in host memory.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    offload_policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload_policy)
    # The root's inputs aren't cast: in bfloat16 the number of supervised tokens would lose its last digits.
    root_precision = replace(precision, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=root_precision, offload_policy=offload_policy)
    # The root's parameters are used at the start and the end of the forward pass, so they stay gathered in between.
    model.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
