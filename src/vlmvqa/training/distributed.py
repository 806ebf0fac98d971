"""How a model is spread over processes: DDP, FSDP2 or DeepSpeed ZeRO. The model itself knows nothing of it.

strategy  parameters   gradients    optimizer states   whose code
ddp       whole        whole        whole              PyTorch's DistributedDataParallel
fsdp      sharded      sharded      sharded            PyTorch's fully_shard, a unit a transformer block
zero1     whole        whole        sharded            DeepSpeed
zero2     whole        sharded      sharded            DeepSpeed
zero3     sharded      sharded      sharded            DeepSpeed

FSDP2 is applied here and not through accelerate, which without a GPU would silently train under DDP instead.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlmvqa.config.launcher import ACCELERATES, LAUNCH
from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError, counted
from vlmvqa.models.interface import Model


def start(settings: DistSettings, cpu: bool) -> None:
    """Join the process group that the launcher's environment describes; alone, where the strategy needs one, make it.

    Args:
        cpu: train on the CPU although there is a GPU.
    """
    if "RANK" not in os.environ:
        if settings.strategy == "ddp":
            return
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    gpu = torch.cuda.is_available() and not cpu
    if gpu:
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        started = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", local + 1)))
        if started > here:
            raise InputError(f"{started} processes were started on a machine with {counted(here, 'GPU')}; start {here}")
        torch.cuda.set_device(local)
    timeout = timedelta(minutes=settings.timeout_minutes + 2)  # after the watch, which names who is missing
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = meet(rank, world, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    # accelerate shares the cores among this machine's ranks, and warns of it.
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    for name in [name for name in os.environ if name.startswith(ACCELERATES)]:
        del os.environ[name]  # read above; accelerate would wrap the model a second time
    if settings.is_zero:
        _quieten_deepspeed()


def correct_deepspeed() -> None:
    """What DeepSpeed's integration gets wrong, put right as soon as there are TrainingArguments.

    Without a GPU these know nothing of DeepSpeed under use_cpu, and without use_cpu they count one process, so that
    every rank would train on the same data. And under ZeRO-3 every model of transformers that is built later would be
    partitioned: the one that is only looked at, too.
    """
    PartialState().distributed_type = DistributedType.DEEPSPEED
    unset_hf_deepspeed_config()


def _quieten_deepspeed() -> None:
    import deepspeed

    # It warns of its own defaults and of what accelerate sets for it; what really runs is checked in preflight.py.
    deepspeed.utils.logger.setLevel("ERROR")
    # Shared-memory collectives for CPUs: they would be compiled first, and gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def meet(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A part of torchrun's store for this attempt alone.

    torchrun tells attempts apart by how often each machine has restarted its workers, and where the machines disagree,
    as they may after a failure, PyTorch's ranks wait for each other in different places. Here each rank leaves a token,
    rank 0 publishes the tokens it sees under a fresh name, and who finds his own there answers; when all have answered,
    they have met. A token that a dead process has left is replaced, and the name with it.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    os.environ[LAUNCH] = store.compare_set("vlmvqa/launch", "", uuid.uuid4().hex).decode()
    mine, name, published = uuid.uuid4().hex, "", [""]
    store.set(f"vlmvqa/token/{rank}", mine)
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            tokens = [_peek(store, f"vlmvqa/token/{other}") for other in range(world)]
            if tokens != published:
                name, published = uuid.uuid4().hex, tokens
                store.set("vlmvqa/meeting", " ".join([name, *published]))
            if store.check([f"vlmvqa/{name}/{other}" for other in range(world)]):
                store.set(f"vlmvqa/{name}/all", "here")
        else:
            name, *published = _peek(store, "vlmvqa/meeting").split(" ")
        if published[rank : rank + 1] == [mine]:
            store.set(f"vlmvqa/{name}/{rank}", "here")
            if store.check([f"vlmvqa/{name}/all"]):
                return dist.PrefixStore(f"vlmvqa/{name}", store)
        time.sleep(0.05)
    raise InputError(f"rank {rank}: not all of {world} ranks came within {timeout}; look at what the others print")


def _peek(store: dist.Store, key: str) -> str:
    """What a key holds now, without waiting for it."""
    return store.get(key).decode() if store.check([key]) else ""


def shard(model: Model, device: torch.device, dtype: torch.dtype | None, offload: bool) -> None:
    """FSDP2 in place: a unit an encoder block and a decoder layer, and one of all the rest.

    Args:
        dtype: what is computed in, where it is not the weights' own; gradients are reduced in fp32 all the same.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    keep = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=keep)
    # The root's inputs stay as they are: in bfloat16 the number of supervised tokens would lose its last digits.
    root = replace(precision, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=root, offload_policy=keep)
    # Gathered when the forward pass begins, needed again when it ends: kept in between.
    model.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]


def deepspeed_config(settings: DistSettings) -> dict[str, Any]:
    """DeepSpeed's configuration; "auto" is filled in by transformers from the trainer's arguments."""
    zero: dict[str, Any] = {"stage": settings.stage, "overlap_comm": torch.cuda.is_available()}
    if settings.offload:
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_param": place, "offload_optimizer": place}
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        # Ours, with a learning rate a part; torch's AdamW where it is offloaded, which needs no compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return _merged(config, settings.options)


def _merged(config: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        nested = isinstance(value, Mapping) and isinstance(config.get(key), dict)
        config[key] = _merged(config[key], value) if nested else value
    return config


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
