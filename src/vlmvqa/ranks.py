"""The processes of a run: rank, world size and communication between them.

Every function also works in a single process, so callers need no special case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
# The first rank to fail stores its error here, so that the other ranks don't report the errors that follow from it.
FAILURE = "vlmvqa/failure"


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first() -> bool:
    """Return whether this is rank 0."""
    return rank() == 0


def print_on_rank0(text: str) -> None:
    """Print a text once."""
    if is_first():
        print(text, flush=True)


def is_distributed() -> bool:
    """Return whether there are several ranks in a process group."""
    return dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on every rank; an exception is raised on every rank."""
    result_and_error: list[Any] = [None, None]
    if is_first():
        try:
            result_and_error[0] = make()
        except Exception as error:
            result_and_error[1] = error
    if is_distributed():
        dist.broadcast_object_list(result_and_error, src=0)
    if result_and_error[1] is not None:
        raise result_and_error[1]
    result: T = result_and_error[0]
    return result


def gather(value: T) -> list[T]:
    """Return every rank's value on every rank, in order of rank."""
    values: list[Any] = [value] * world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def local_main_first() -> Iterator[None]:
    """Run the block on each machine's first rank before its other ranks, for example to fill a cache."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def claim_failure(sentence: str) -> str | None:
    """Report that this rank failed.

    Returns:
        None if this is the first failure, or that is unknown; otherwise the sentence of the first.
    """
    if not is_distributed():
        return None
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        first = store.compare_set(FAILURE, "", f"rank {rank()}: {sentence}").decode()
    except RuntimeError:  # the store is gone with rank 0: an error reported twice is better than none
        return None
    return None if first == f"rank {rank()}: {sentence}" else first
