"""What a function takes in time and memory, and what the machine can do at best."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from vlmvqa.models import flops

R = TypeVar("R")


@dataclass(frozen=True)
class Measured(Generic[R]):
    """What a function took and gave.

    Attributes:
        seconds: of the fastest repeat, since what else the machine does only ever adds to a time.
        peak: bytes above the start (None where unknown).
        result: the last one.
        cpu_seconds: of all threads, the least: what other work on the machine disturbs least.
    """

    seconds: float
    peak: int | None
    result: R
    cpu_seconds: float = 0.0


def measure(
    function: Callable[[], R],
    device: torch.device,
    repeats: int = 1,
    warm: Callable[[], object] | None = None,
    at_least: float = 0.0,
) -> Measured[R]:
    """A function's peak memory, and then its time: looking at the memory takes some.

    Args:
        repeats: how often it is timed.
        warm: what runs once before, for the memory (default: the function itself).
        at_least: seconds; a repeat is the mean of as many calls as take so long, so that a quick function is not
            faster only because it finds a short moment in which the machine does nothing else.
    """
    with PeakMemory(device) as memory:
        (warm or function)()
    found: list[tuple[float, float, R]] = [_mean(function, device, at_least) for _ in range(repeats)]
    seconds, cpu_seconds, results = zip(*found, strict=True)
    return Measured(min(seconds), memory.bytes, results[-1], min(cpu_seconds))


def _mean(function: Callable[[], R], device: torch.device, at_least: float) -> tuple[float, float, R]:
    """Seconds and processor seconds of a call, and the last one's result."""
    started, cpu_started = _now(device), time.process_time()
    result, calls = function(), 1
    while (seconds := _now(device) - started) < at_least:
        del result  # the last one's memory is not this one's
        result, calls = function(), calls + 1
    return seconds / calls, (time.process_time() - cpu_started) / calls, result


class PeakMemory:
    """Peak memory of a block above its start, in bytes; None where it cannot be told.

    On CUDA PyTorch counts it. On Linux a thread looks at the resident memory of the process every few milliseconds:
    what PyTorch's operators take inside themselves is counted too, but a shorter peak is missed.
    """

    INTERVAL = 0.004  # seconds

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            # Else memory that was freed before, but kept, would be taken again without being seen.
            ctypes.CDLL(None).malloc_trim(0)
            self._start = self._peak = _resident()
            self._stop = threading.Event()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif sys.platform == "linux":
            self._stop.set()
            self._watcher.join()
            self.bytes = max(self._peak, _resident()) - self._start

    def _watch(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best matrix product now: other work on the machine may leave more of it later."""
    flops.matrix_rate.cache_clear()
    return flops.matrix_rate(device, dtype)


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        started = _now(device)
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (_now(device) - started))
    return best
