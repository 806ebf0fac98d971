"""Rendezvous of the ranks of a job: tasks of srun, and ranks that torchrun has restarted."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from vlmvqa.errors import InputError
from vlmvqa.ranks import LAUNCH


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


def slurm_task(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables torchrun would set for a task of `srun`, one task per GPU on any number of machines."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    command = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": environment["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],
        "MASTER_ADDR": hosts[0],
        # Differs between jobs, so that two may share a machine.
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 10000)),
    }
