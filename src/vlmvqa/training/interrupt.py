"""Stop signals.

After SIGTERM, SIGUSR1 (sent by SLURM before it ends a job) or Ctrl-C, a run finishes its step, saves a checkpoint and
stops; a second Ctrl-C, or one during an evaluation, stops at once. With several ranks, `hang_monitor.py` ends the run
when one of them hangs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlmvqa import ranks

if TYPE_CHECKING:
    from vlmvqa.training.hang_monitor import HangMonitor

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BATCH_SYSTEM_SIGNALS = SIGNALS[:2]  # their sender waits until an evaluation ends; a user at a keyboard need not


@contextmanager
def blocked_signals(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Defer signals until the block ends. Processes forked inside it never receive them.

    Signals are sent to process groups, but a run that saves before it stops still needs its data workers. PyTorch
    cannot terminate such a worker either if it hangs; it is killed when the run ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_workers() -> None:
    """Kill data workers at exit: Python would send SIGTERM, which `blocked_signals` blocks, and wait forever."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler reports a worker's end as an error
    for worker in workers:
        worker.kill()


Finalize(None, _kill_workers, exitpriority=0)  # after pools have ended their own workers


class StopHandler(TrainerCallback):
    """Stop a run after a signal, or with an error when a rank hangs.

    Args:
        timeout_minutes: time without progress after which a rank counts as hanging.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self.timeout = 60 * timeout_minutes
        self.signal: str | None = None  # received by this rank
        self.stopped_by: str | None = None  # that all ranks agreed to stop for
        self.batches = 0  # micro-batches started
        self.step = 0
        self.is_paused = False  # no progress is expected
        self.previous_handlers: dict[int, Any] = {}
        self.monitor: HangMonitor | None = None

    def start(self) -> None:
        """Install the signal handlers; with several ranks, start publishing this rank's progress."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored, for example, by a shell's background jobs
                self.previous_handlers[number] = signal.signal(number, self._handle)
        if ranks.is_distributed():
            from vlmvqa.training.hang_monitor import HangMonitor

            self.monitor = HangMonitor(self)

    def heartbeat(self, step: int) -> None:
        """Record that a micro-batch of the step after `step` starts."""
        self.batches, self.step = self.batches + 1, step + 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the timeout where ranks work at their own pace (evaluation, saving)."""
        self.is_paused = True
        yield
        self.is_paused = False
        self.batches += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop all ranks after the same step if any rank received a signal."""
        received = torch.tensor(SIGNALS.index(signal.Signals[self.signal]) + 1 if self.signal else 0)
        if ranks.is_distributed():
            dist.all_reduce(received, dist.ReduceOp.MAX)
        if received:
            self.stopped_by = SIGNALS[int(received) - 1].name
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Skip the epoch's checkpoint and evaluation after a signal: the step has saved already."""
        if self.stopped_by:
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the previous signal handlers."""
        if self.monitor is not None:
            self.monitor.finish()
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and (self.is_paused or self.signal == "SIGINT"):
            raise KeyboardInterrupt
        if number == signal.SIGINT and ranks.is_first():  # not with print, which the signal may have interrupted
            os.write(2, b"\nCtrl-C: finishing this step and saving, then stopping; press it again to stop at once\n")
        self.signal = signal.Signals(number).name
