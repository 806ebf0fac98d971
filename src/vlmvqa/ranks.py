"""The processes of a run: which one this is, how many there are, what they tell each other.

Everything works in a single process too, so that no caller asks whether there are several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
# The first rank to fail leaves its sentence here, so that the others stay silent about what follows from it.
FAILURE = "vlmvqa/failure"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first() -> bool:
    return rank() == 0


def say(text: str) -> None:
    """Print, once for all ranks."""
    if is_first():
        print(text, flush=True)


def is_distributed() -> bool:
    """Whether there is anyone to talk to."""
    return dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; the others wait for it. What it raises is raised on all."""
    made: list[Any] = [None, None]
    if is_first():
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    if is_distributed():
        dist.broadcast_object_list(made, src=0)
    if made[1] is not None:
        raise made[1]
    found: T = made[0]
    return found


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank, in order of rank."""
    values: list[Any] = [value] * world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def local_main_first() -> Iterator[None]:
    """Run the block on the first rank of each machine, then on its others: for what is made once and then read."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def claim_failure(sentence: str) -> str | None:
    """Say that this rank failed. None if it is the first to, as far as can be known; else what the first one said."""
    if not is_distributed():
        return None
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        first = store.compare_set(FAILURE, "", f"rank {rank()}: {sentence}").decode()
    except RuntimeError:  # the store is gone with rank 0: better said twice than not at all
        return None
    return None if first == f"rank {rank()}: {sentence}" else first
