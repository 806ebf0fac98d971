"""A run that is asked to stop, and ranks that no longer answer.

SIGTERM, SIGUSR1 (what SLURM sends before it takes a machine away) and Ctrl-C let the step at work end, save, and stop;
a second Ctrl-C, or one during an evaluation, stops at once. Ranks wait for each other at every step: a rank that hangs
would hang all. Each rank says where it stands, and when nothing has moved for too long, the run ends with a sentence
that names who is missing.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlmvqa import ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENT = SIGNALS[:2]  # who sends these can wait for an evaluation to end; someone at a keyboard need not


@contextmanager
def held_back(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Keep notices to stop until the end of the block. Processes that are forked in it never hear of any.

    They come to whole process groups: a run saves before it stops, and needs until then the workers that read for it.
    PyTorch cannot end such a worker either, if it hangs: it goes with the run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
    """Python is about to end them with SIGTERM, which `held_back` keeps from them, and to wait for it to work."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler calls a worker's end an error
    for worker in workers:
        worker.kill()


Finalize(None, _end_workers, exitpriority=0)  # after pools have ended their own


class Watch(TrainerCallback):
    """Both of the above, for one run.

    Args:
        timeout_minutes: how long nothing may move.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self.timeout = 60 * timeout_minutes
        self.signal: str | None = None  # the one that asked this rank to stop
        self.stopped_by: str | None = None  # the one that all ranks agreed to stop for
        self.place = 0  # micro-batches begun
        self.step = 0
        self.waits = False  # whether standing still is in order
        self.before: dict[int, Any] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Listen for signals; with several ranks, begin to say where this one stands."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as for a job in the background, whom no keyboard stops
                self.before[number] = signal.signal(number, self._asked)
        if ranks.is_distributed():
            self.thread.start()
            atexit.register(self._finish)  # a thread inside PyTorch's store when Python ends would abort the process

    def beat(self, step: int) -> None:
        """A micro-batch begins, in this optimizer step."""
        self.place, self.step = self.place + 1, step + 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what ranks do each at their own pace."""
        self.waits = True
        yield
        self.waits = False
        self.place += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop all ranks after the same step if any of them was asked to."""
        asked = torch.tensor(SIGNALS.index(signal.Signals[self.signal]) + 1 if self.signal else 0)
        if ranks.is_distributed():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked:
            self.stopped_by = SIGNALS[int(asked) - 1].name
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopped_by:  # it has saved, and there is no time to evaluate
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._finish()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _finish(self) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join(timeout=5)

    def _asked(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and (self.waits or self.signal == "SIGINT"):
            raise KeyboardInterrupt
        if number == signal.SIGINT and ranks.is_first():  # not by print, which may be what was interrupted
            os.write(2, b"\nCtrl-C: finishing this step and saving, then stopping; press it again to stop at once\n")
        self.signal = signal.Signals(number).name

    def _watch(self) -> None:
        store = dist.PrefixStore("vlmvqa/watch", dist.distributed_c10d._get_default_store())
        everyone = [str(rank) for rank in range(ranks.world_size())]
        seen: dict[str, tuple[str, float]] = {rank: ("", time.monotonic()) for rank in everyone}
        place, moved = self.place, time.monotonic()
        number = 0
        while not self.over.wait(min(self.timeout / 8, 5.0)):
            number += 1
            now = time.monotonic()
            if self.waits or self.place != place:
                place, moved = self.place, now
            try:
                store.set(str(ranks.rank()), f"{number} {self.place} {self.step}")
                for rank in everyone:
                    said = store.get(rank).decode() if store.check([rank]) else ""
                    if said != seen[rank][0]:
                        seen[rank] = (said, now)
            except RuntimeError:  # rank 0, which holds the store, is gone: PyTorch says so itself
                return
            silent = [rank for rank in everyone if now - seen[rank][1] > self.timeout]
            if silent:
                self._end(f"rank {', '.join(silent)} has not answered for {self.timeout / 60:g} minutes")
            if now - moved > self.timeout:
                self._end(self._who_is_behind({rank: said for rank, (said, _) in seen.items()}))

    def _who_is_behind(self, said: dict[str, str]) -> str:
        places = {rank: int(line.split()[1]) for rank, line in said.items()}
        behind = [rank for rank in said if places[rank] == min(places.values())]
        where = f"for {self.timeout / 60:g} minutes"
        if len(behind) == len(said):
            return f"all ranks have stood at step {self.step} {where}"
        steps = ", ".join(f"rank {rank} (step {said[rank].split()[2]})" for rank in behind)
        return f"the others have waited {where} for {steps}"

    def _end(self, sentence: str) -> None:
        first = ranks.claim_failure(sentence)
        if first is None or "minutes" not in first:
            print(
                f"\nerror: {sentence}; look at what that rank was doing, and resume with resume=auto "
                "(dist.timeout_minutes sets the wait)",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)
