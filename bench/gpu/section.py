"""A section of `bench.gpu`: its deadline, its rows and comparisons, and its JSON file."""

from __future__ import annotations

import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch._dynamo

from bench.gpu.sizes import Sizes

Row = dict[str, Any]
# Sections compile FlexAttention for more combinations of shape, mask and options than the default limit of 8. Above it
# FlexAttention would run uncompiled; an exception is better.
DYNAMO = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
GRACE = 15.0  # seconds after its deadline at which a row that still runs is interrupted


class DeadlineError(BaseException):
    """A row runs after its section's deadline; no `Exception`, because compilers catch those."""


@dataclass
class Section:
    """Results of a section.

    Attributes:
        ends: `time.monotonic()` after which no row starts.
        rows: one per measurement; `skipped` or `error` says why a row has no figures.
        comparisons: a value, its limit, and whether it passed.
        notes: what was not measured or was replaced, and why.
        agree: combines all ranks' decisions to skip a row, so that all take the same one (None: one process).
        state: passed, failed (a comparison), error, stopped (at its deadline) or skipped.
    """

    name: str
    device: torch.device
    sizes: Sizes
    ends: float = float("inf")
    rows: list[Row] = field(default_factory=list)
    comparisons: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    agree: Callable[[bool], bool] | None = None
    state: str = "passed"
    error: str = ""
    seconds: float = 0.0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def failed(self) -> bool:
        return self.state in ("failed", "error")

    @property
    def late(self) -> bool:
        """Whether the deadline has passed, on any rank."""
        late = time.monotonic() > self.ends
        return self.agree(late) if self.agree else late

    def row(self, name: str, measure: Callable[..., Row], *arguments: Any) -> Row:
        """Add the row that `measure(*arguments)` returns, unless the deadline has passed.

        Out of memory is a result. Any other exception is recorded, and the next row is measured. With several
        processes an exception ends all of them, because the others would wait for this one.
        """
        found: Row = {"name": name}
        self.rows.append(found)
        if self.late:
            return self._skip(found, "deadline")
        try:
            found |= measure(*arguments)
        except torch.OutOfMemoryError:
            if self.agree:
                raise
            self._skip(found, "out of memory")
        except DeadlineError:
            self._skip(found, "stopped at the deadline")
            raise
        except Exception as error:
            if self.agree:
                raise
            found["error"] = traceback.format_exc()
            self.state, self.error = "error", f"{name}: {_first_line(error)}"
        release()
        return found

    def compare(self, name: str, value: float, limit: float) -> None:
        """Add a comparison, which passes if the value is at most the limit; NaN fails."""
        passed = value <= limit
        self.comparisons.append({"name": name, "value": value, "limit": limit, "passed": passed})
        if not passed and self.state == "passed":
            self.state, self.error = "failed", f"{name}: {value:.3g} is above {limit:.3g}"

    def needs_cuda(self, what: str) -> None:
        self.notes.append(f"{what}: not measured: needs CUDA")

    def run(self, function: Callable[[Section], None]) -> None:
        """Run the section; exceptions become its state."""
        started = time.monotonic()
        if self.late:
            self.state, self.error = "skipped", "its deadline had passed before it started"
            return
        try:
            with (
                interrupt(None if self.agree else self.ends - started + GRACE),
                torch._dynamo.config.patch(DYNAMO),
                torch.backends.cudnn.flags(enabled=True, allow_tf32=False),  # fp32 is the reference
            ):
                function(self)
        except DeadlineError:
            self.state, self.error = "stopped", "a row ran after the deadline"
        except Exception as error:
            if self.agree:
                raise
            self.state, self.error = "error", _first_line(error)
            self.notes.append(traceback.format_exc())
        finally:
            self.seconds = time.monotonic() - started
            torch._dynamo.reset()
            release()

    def write(self, folder: Path) -> None:
        """Write `NAME.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        names = ("state", "error", "seconds", "notes", "comparisons", "rows")
        found = {name: getattr(self, name) for name in names}
        known = {"section": self.name, "device": str(self.device), "size": self.sizes.name}
        (folder / f"{self.name}.json").write_text(json.dumps(known | found, indent=2) + "\n")

    def _skip(self, found: Row, reason: str) -> Row:
        found["skipped"] = reason
        return found


@contextmanager
def interrupt(seconds: float | None) -> Iterator[None]:
    """Raise `DeadlineError` in the main thread after some seconds (None or infinity: never)."""

    def late(number: int, frame: FrameType | None) -> None:
        raise DeadlineError

    if seconds is None or seconds == float("inf"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release() -> None:
    """Free memory that no object uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(device: torch.device, function: Callable[[], object], repeats: int, warm: int = 1) -> list[float]:
    """Return the seconds of each call after warm-up calls: on CUDA between two events, otherwise by the clock."""
    for _ in range(warm):
        function()
    if device.type != "cuda":
        return [_clocked(function) for _ in range(repeats)]
    found = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        function()
        last.record()
        torch.cuda.synchronize(device)
        found.append(first.elapsed_time(last) / 1000)
    return found


def _clocked(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
