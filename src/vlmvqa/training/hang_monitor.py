"""Stop a run of several ranks when one of them hangs, with an error message that names it.

Ranks wait for each other in every step, so a rank that hangs blocks all others. Each rank publishes its progress in
PyTorch's store. If no rank makes progress for `dist.timeout_minutes`, the error names those that are furthest behind.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch.distributed as dist

from vlmvqa import ranks
from vlmvqa.failures import claim_failure
from vlmvqa.training.interrupt import StopHandler


class Progress(NamedTuple):
    """The progress that a rank publishes.

    Attributes:
        beat: grows while the rank's monitor runs.
        batches: micro-batches started.
        step: the optimizer step that it is in.
    """

    beat: int = 0
    batches: int = 0
    step: int = 0


class HangMonitor:
    """A thread that publishes this rank's progress (`StopHandler.heartbeat`) and monitors the others'."""

    def __init__(self, handler: StopHandler) -> None:
        self.handler = handler
        self.finished = threading.Event()
        self.thread = threading.Thread(target=self._monitor, daemon=True)
        self.thread.start()
        atexit.register(self.finish)  # a thread inside PyTorch's store at exit would abort the process

    def finish(self) -> None:
        """Stop monitoring."""
        self.finished.set()
        if self.thread.is_alive():
            self.thread.join(timeout=5)

    def _monitor(self) -> None:
        """Publish this rank's progress and compare it with the others' until training ends."""
        store = dist.PrefixStore("vlmvqa/watch", dist.distributed_c10d._get_default_store())
        handler, timeout, beat = self.handler, self.handler.timeout, 0
        moved, batches = time.monotonic(), handler.batches
        seen = {str(rank): (Progress(), time.monotonic()) for rank in range(ranks.world_size())}
        while not self.finished.wait(min(timeout / 8, 5.0)):
            beat, now = beat + 1, time.monotonic()
            if handler.is_paused or handler.batches != batches:
                moved, batches = now, handler.batches
            try:
                store.set(str(ranks.rank()), json.dumps(Progress(beat, handler.batches, handler.step)))
                for rank, (before, _) in seen.items():
                    published = Progress(*json.loads(store.get(rank))) if store.check([rank]) else before
                    if published != before:
                        seen[rank] = (published, now)
            except RuntimeError:  # rank 0, which hosts the store, has exited; PyTorch reports this
                return
            quiet = {rank: now - when for rank, (_, when) in seen.items()}
            if silent := [rank for rank, seconds in quiet.items() if seconds > timeout]:
                self._exit(f"rank {', '.join(silent)} has not answered for {timeout / 60:g} minutes")
            if is_stalled(quiet, now - moved, timeout):
                self._exit(self._describe_hang({rank: published for rank, (published, _) in seen.items()}))

    def _describe_hang(self, published: Mapping[str, Progress]) -> str:
        least = min(progress.batches for progress in published.values())
        behind = {rank: progress for rank, progress in published.items() if progress.batches == least}
        duration = f"for {self.handler.timeout / 60:g} minutes"
        if len(behind) == len(published):
            return f"all ranks have been at step {self.handler.step} {duration}"
        steps = ", ".join(f"rank {rank} (step {progress.step})" for rank, progress in behind.items())
        return f"the other ranks have waited {duration} for {steps}"

    def _exit(self, sentence: str) -> None:
        first = claim_failure(sentence)
        if first is None or "minutes" not in first:
            print(
                f"\nerror: {sentence}; find out why it hangs, and resume with resume=auto "
                "(dist.timeout_minutes sets the timeout)",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)


def is_stalled(quiet: Mapping[str, float], stalled: float, timeout: float) -> bool:
    """Return whether all ranks answer, but none progresses.

    A rank that stops answering stops the others too, perhaps before its last answer is read. A rank that has been quiet
    for half the timeout is therefore waited for, until it answers or is the one to name.

    Args:
        quiet: seconds since each rank last answered.
        stalled: seconds since this rank last progressed.
        timeout: seconds (`dist.timeout_minutes`).
    """
    return stalled > timeout and max(quiet.values()) < timeout / 2
