"""The processes of a run: their launcher, rank and world size, communication, and output that appears once.

Every function also works in a single process, so callers need no special case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from tqdm import tqdm

T = TypeVar("T")
# Identifies this launch; unchanged when torchrun restarts its workers.
LAUNCH = "VLMVQA_LAUNCH"
# Variables in which accelerate's launcher passes the strategy of its config file.
ACCELERATES = ("FSDP_", *(f"ACCELERATE_{name}_" for name in ("USE", "DEEPSPEED", "CONFIG", "GRADIENT", "DYNAMO")))


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


def launcher_choice(environment: Mapping[str, str], arguments: list[str]) -> tuple[str, str] | None:
    """Return the `dist` choice that the launcher implies, and the launcher's name; None without such a launcher.

    accelerate passes its config file's strategy in the environment; `deepspeed` starts scripts with --local_rank.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        offload = environment.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
        return ("fsdp_offload" if offload else "fsdp"), "accelerate's config file"
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            return "its deepspeed_config_file", "accelerate's config file"  # not read: dist.options has its keys
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        kept = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        return (f"zero{stage}_offload" if kept == "cpu" else f"zero{stage}"), "accelerate's config file"
    if any(argument.startswith(("--local_rank", "--local-rank")) for argument in arguments):
        return "zero2", "the deepspeed launcher"
    return None


def bar(
    items: Iterable[Any] | None = None,
    *,
    doing: str,
    unit: str,
    total: int | None = None,
    shown: bool = True,
    **more: Any,
) -> tqdm[Any]:
    """Return a tqdm bar over `items`, or one to update by hand; it disappears when it is finished.

    Args:
        items: the items to iterate over.
        doing: the bar's label ("packing val").
        unit: the name of the counted items.
        total: the number of items, if `items` has no length.
        shown: False disables the bar.
        more: further arguments of tqdm.
    """
    hidden = None if shown and is_first() else True  # None: hide it if stderr is not a terminal
    return tqdm(items, desc=doing, unit=f" {unit}", total=total, disable=hidden, **{"leave": False, **more})


@contextmanager
def one_job() -> Iterator[None]:
    """Leave the process as it was: remove the variables that a job adds to the environment, and its process group.

    After an error the group is kept, because `cli.py` tells the other ranks of it.
    """
    before = set(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - before:
            del os.environ[name]
    if dist.is_initialized():
        dist.destroy_process_group()
