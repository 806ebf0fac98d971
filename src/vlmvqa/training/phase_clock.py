"""A clock for the phases of a training step, on the CPU or on a CUDA stream."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch


class PhaseClock:
    """Seconds per phase; the clock is in one phase at a time, or stopped (None).

    On CUDA it times the device's stream: events are recorded and read once they have passed, without synchronizing.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.marks: deque[tuple[str | None, Any]] = deque()  # phase and start time
        self.free_events: list[torch.cuda.Event] = []

    @property
    def phase(self) -> str | None:
        """The current phase."""
        return self.marks[-1][0] if self.marks else None

    def switch(self, phase: str | None) -> None:
        """Start a phase, or stop the clock."""
        self.marks.append((phase, self._now()))
        while len(self.marks) > 1 and (not self.cuda or self.marks[1][1].query()):
            self._count_oldest()

    def read(self) -> dict[str, float]:
        """Return the seconds per phase between the last call and the last switch."""
        if self.cuda and self.marks:
            self.marks[-1][1].synchronize()
        while len(self.marks) > 1:
            self._count_oldest()
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = self.free_events.pop() if self.free_events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count_oldest(self) -> None:
        phase, begin = self.marks.popleft()
        end = self.marks[0][1]
        if phase is not None:
            elapsed = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
        if self.cuda:
            self.free_events.append(begin)
