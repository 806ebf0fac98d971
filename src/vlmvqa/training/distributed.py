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
import time
import uuid
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
from vlmvqa.ranks import ACCELERATES, LAUNCH


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
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = rendezvous(rank, world, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    # accelerate divides the cores among this machine's ranks, and warns about it.
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    for name in [name for name in os.environ if name.startswith(ACCELERATES)]:
        del os.environ[name]  # config/launcher.py has read them; accelerate would wrap the model a second time
    if settings.is_zero:
        from vlmvqa.training import zero

        zero.silence()


def rendezvous(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Return a section of torchrun's store that only this attempt's ranks use.

    torchrun numbers attempts by how often each machine has restarted its workers. After a failure machines may disagree
    on that number, and then PyTorch's ranks wait for each other at different keys. Here each rank stores a token. Rank
    0 publishes all tokens it finds under a new random name; a rank that finds its own token there confirms, and when
    all have confirmed, the name becomes the prefix of the returned store. When a restarted rank replaces the token of a
    dead one, rank 0 publishes again under another name.

    Raises:
        InputError: not all ranks have confirmed within the timeout.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    os.environ[LAUNCH] = store.compare_set("vlmvqa/launch", "", uuid.uuid4().hex).decode()
    token, name, published = uuid.uuid4().hex, "", [""]
    store.set(f"vlmvqa/token/{rank}", token)
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            tokens = [_get_if_set(store, f"vlmvqa/token/{other}") for other in range(world)]
            if tokens != published:
                name, published = uuid.uuid4().hex, tokens
                store.set("vlmvqa/meeting", " ".join([name, *published]))
            if store.check([f"vlmvqa/{name}/{other}" for other in range(world)]):
                store.set(f"vlmvqa/{name}/all", "here")
        else:
            name, *published = _get_if_set(store, "vlmvqa/meeting").split(" ")
        if published[rank : rank + 1] == [token]:
            store.set(f"vlmvqa/{name}/{rank}", "here")
            if store.check([f"vlmvqa/{name}/all"]):
                return dist.PrefixStore(f"vlmvqa/{name}", store)
        time.sleep(0.05)
    raise InputError(f"rank {rank}: not all {world} ranks started within {timeout}; look at the output of the others")


def _get_if_set(store: dist.Store, key: str) -> str:
    """Return a key's value without waiting; empty if it isn't set."""
    return store.get(key).decode() if store.check([key]) else ""


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
