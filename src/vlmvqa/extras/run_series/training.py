"""Train runs one after the other in one process."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from vlmvqa import ranks
from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError
from vlmvqa.training import distributed
from vlmvqa.training.interrupt import SIGNALS

T = TypeVar("T")


def is_finished(folder: Path) -> bool:
    """Return whether a run has trained and scored its model."""
    return (folder / "metrics.json").is_file() and (folder / "predictions.jsonl").is_file()


def run_job(start: Callable[[], bool], record: Callable[[str | None], None]) -> bool:
    """Run a training that leaves the process as it was; return whether a signal stopped it.

    Args:
        start: trains; returns whether a signal stopped it.
        record: called after a training that was not stopped, with its error message or None. A training that fails
            does not stop the command, except under several ranks, where the others wait for the failed one.
    """
    error = None
    with isolated_job():
        try:
            if start():
                return True
        except Exception as found:
            error = str(found) if isinstance(found, InputError) else traceback.format_exc().strip()
            if ranks.world_size() > 1:
                record(error)
                raise
    record(error)
    return False


@contextmanager
def isolated_job() -> Iterator[None]:
    """Leave the process as it was before a training in the block."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with ranks.one_job():
        yield
        comm = sys.modules.get("deepspeed.comm")
        if comm is not None and comm.is_initialized():  # it also keeps the groups in its own variables
            comm.destroy_process_group()
    for number, handler in handlers.items():  # a run that failed leaves its own
        signal.signal(number, handler)
    if "torch._dynamo" in sys.modules:  # each run compiles its own blocks
        torch._dynamo.reset()
    gc.collect()


def ask_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on every rank, between trainings with their own process groups."""
    with ranks.one_job():
        if "RANK" in os.environ:
            distributed.start(DistSettings(timeout_minutes=24 * 60), cpu=True)
        return ranks.broadcast_from_rank0(make)


def duration(seconds: float) -> str:
    """Format a duration in hours and minutes, at least one."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
