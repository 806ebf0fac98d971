"""Time and peak memory of a function, and the machine's peak rates."""

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
    """Time, memory and result of a function.

    Attributes:
        seconds: time of the fastest repeat, because other load on the machine only adds to a time.
        peak: bytes above the start (None if unknown).
        result: the last result.
        cpu_seconds: least processor time of all threads, which other load disturbs least.
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
    """Measure a function's peak memory, then its time: measuring the memory takes time itself.

    Args:
        repeats: number of timings.
        warm: function to run once before, for the memory (default: the function itself).
        at_least: seconds; a repeat is the mean of as many calls as take this long, so that a short function does not
            appear faster only because it hit a moment without other load.
    """
    with PeakMemory(device) as memory:
        (warm or function)()
    found: list[tuple[float, float, R]] = [_mean(function, device, at_least) for _ in range(repeats)]
    seconds, cpu_seconds, results = zip(*found, strict=True)
    return Measured(min(seconds), memory.bytes, results[-1], min(cpu_seconds))


def _mean(function: Callable[[], R], device: torch.device, at_least: float) -> tuple[float, float, R]:
    """Return the mean seconds and processor seconds of a call, and the last result."""
    started, cpu_started = _now(device), time.process_time()
    result, calls = function(), 1
    while (seconds := _now(device) - started) < at_least:
        del result  # free the memory of the previous result
        result, calls = function(), calls + 1
    return seconds / calls, (time.process_time() - cpu_started) / calls, result


class PeakMemory:
    """Peak memory of a block above its start, in bytes; None if it cannot be measured.

    On CUDA PyTorch reports it. On Linux a thread samples the resident memory of the process every few milliseconds:
    this includes the internal buffers of PyTorch's operators, but misses shorter peaks.
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
            # Otherwise freed but cached memory would be reused without being counted.
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
    """Measure the FLOP/s of the best matrix product now; other load on the machine changes over time."""
    flops.matrix_rate.cache_clear()
    return flops.matrix_rate(device, dtype)


def bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a large copy reads and writes."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        started = _now(device)
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (_now(device) - started))
    return best
