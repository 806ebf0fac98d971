"""Stop a run of several ranks when one of them hangs, with an error message that names it.

Ranks wait for each other in every step, so a rank that hangs blocks all others. Each rank publishes its progress in
PyTorch's store. If no rank makes progress for `dist.timeout_minutes`, the error names those that are furthest behind.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time

import torch.distributed as dist

from vlmvqa import ranks
from vlmvqa.training.interrupt import StopHandler


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
        all_ranks = [str(rank) for rank in range(ranks.world_size())]
        seen: dict[str, tuple[str, float]] = {rank: ("", time.monotonic()) for rank in all_ranks}
        batches, moved = self.handler.batches, time.monotonic()
        number = 0
        while not self.finished.wait(min(self.handler.timeout / 8, 5.0)):
            number += 1
            now = time.monotonic()
            if self.handler.is_paused or self.handler.batches != batches:
                batches, moved = self.handler.batches, now
            try:
                store.set(str(ranks.rank()), f"{number} {self.handler.batches} {self.handler.step}")
                for rank in all_ranks:
                    published = store.get(rank).decode() if store.check([rank]) else ""
                    if published != seen[rank][0]:
                        seen[rank] = (published, now)
            except RuntimeError:  # rank 0, which hosts the store, has exited; PyTorch reports this
                return
            silent = [rank for rank in all_ranks if now - seen[rank][1] > self.handler.timeout]
            if silent:
                self._exit(f"rank {', '.join(silent)} has not answered for {self.handler.timeout / 60:g} minutes")
            if now - moved > self.handler.timeout:
                self._exit(self._describe_hang({rank: published for rank, (published, _) in seen.items()}))

    def _describe_hang(self, published: dict[str, str]) -> str:
        batches = {rank: int(line.split()[1]) for rank, line in published.items()}
        behind = [rank for rank in published if batches[rank] == min(batches.values())]
        duration = f"for {self.handler.timeout / 60:g} minutes"
        if len(behind) == len(published):
            return f"all ranks have been at step {self.handler.step} {duration}"
        steps = ", ".join(f"rank {rank} (step {published[rank].split()[2]})" for rank in behind)
        return f"the other ranks have waited {duration} for {steps}"

    def _exit(self, sentence: str) -> None:
        first = ranks.claim_failure(sentence)
        if first is None or "minutes" not in first:
            print(
                f"\nerror: {sentence}; find out why it hangs, and resume with resume=auto "
                "(dist.timeout_minutes sets the timeout)",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)
