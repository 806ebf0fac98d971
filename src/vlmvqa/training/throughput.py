"""Throughput, time per phase, memory and MFU, for every training record of `log.jsonl` and the loggers.

questions_per_second, tokens_per_second, supervised_tokens_per_second   over all ranks
padding          percent of token positions that are padding
time_data        until the next batch is on the device: reading, building rows, copying; on CUDA only the part that
                 doesn't overlap with computation
time_encoder     vision encoder and projector, forward and backward
time_language_model   embeddings and decoder, forward and backward
time_loss        output head and cross-entropy, forward and backward
time_optimizer   after the backward pass: waiting for other ranks' gradients, clipping, optimizer step
time_other       writing the log
peak_memory_gib  maximum over ranks: peak CUDA memory allocated since the last record; on a CPU as peak_rss_gib
peak_rss_gib     maximum over ranks: peak resident host memory of the process so far
mfu              model FLOPs utilisation in percent (`models/flops.py`)
tera_flop        10^12 floating-point operations since the last record, over all ranks

time_* are percentages of the training time of rank 0; evaluations and checkpoints are excluded. In the forward pass,
hooks on the modules switch the phase; in the backward pass, hooks on the tensors between the modules switch it in
reverse order. The clock is always in exactly one phase, so the percentages add up to 100. (One boundary is approximate:
the gradient of the embeddings is computed last and counts as encoder.)
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlmvqa import ranks
from vlmvqa.models.flops import COUNTED, Flops, count, matrix_rate
from vlmvqa.models.interface import PARTS, Model
from vlmvqa.sequence.rows import Batch
from vlmvqa.training.log import rounded

PHASES = ("data", "encoder", "language_model", "loss", "optimizer", "other")
GIB = 2**30


def peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: allocated since the last call on CUDA, resident since the start on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return peak_resident()


def peak_resident() -> int:
    """Return the highest resident size of this process so far, in bytes."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


class ThroughputMeter(TrainerCallback):
    """Measure a training run. The trainer calls `begin` and `backward` for each micro-batch.

    The hooks stay on the model until training ends, and do nothing while the clock is paused.
    """

    def __init__(self, vlm: Model) -> None:
        self.vlm = vlm
        self.device = torch.device("cpu")
        self.clock = PhaseClock(self.device)  # stopped
        self.hooks: list[RemovableHandle] = []
        self.window = getattr(vlm.part("language").module.config, "sliding_window", None)
        self.flops: Flops | None = None
        self.peak_flops = 0.0  # per second
        self.reset()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the hooks, measure the device's peak FLOPs and start the clock."""
        self.detach()
        self.device, self.clock = args.device, PhaseClock(args.device)
        self.attach()
        self.flops = self.vlm.flops()
        weights = next(self.vlm.parameters()).dtype
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weights
        self.peak_flops = matrix_rate(self.device, dtype)
        self.reset()
        peak_memory(self.device)
        self.clock.switch("data")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start waiting for the next batch."""
        self.enter("data")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock and remove the hooks."""
        self.clock = PhaseClock(self.device)
        self.detach()

    def attach(self) -> None:
        """Add hooks to the model's parts; activation checkpointing doesn't run them a second time."""
        vision, projector, language = (self.vlm.part(name).module for name in PARTS)
        self.hooks = [
            vision.register_forward_pre_hook(lambda *_: self.enter("encoder")),
            projector.register_forward_pre_hook(lambda *_: self.enter("encoder")),  # with cached features
            projector.register_forward_hook(lambda _, __, output: self._handover("encoder", output, "language_model")),
            language.register_forward_hook(lambda _, __, output: self._handover("language_model", output, "loss")),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def reset(self) -> None:
        """Set the counts to zero."""
        self.shapes: Counter[str] = Counter()
        self.counts = torch.zeros(len(COUNTED), dtype=torch.int64)

    def enter(self, phase: str) -> None:
        """Start a phase, unless the clock is stopped."""
        if self.clock.phase is not None:
            self.clock.switch(phase)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for work that isn't training."""
        phase = self.clock.phase
        self.clock.switch(None)
        yield
        self.clock.switch(phase)

    def begin(self, batch: Batch) -> None:
        """Count a micro-batch before its forward pass, and start the first phase of that pass."""
        self.shapes["positions"] += batch["document"].numel()
        self.shapes["images"] += len(batch["pixel_values" if "pixel_values" in batch else "image_features"])
        self.shapes["encoded"] += len(batch.get("pixel_values", ()))
        self.counts = self.counts.to(batch["role"].device) + count(batch, self.window)
        self.enter("language_model")

    def backward(self, loss: Tensor) -> None:
        """Start the optimizer's phase at the end of this loss's backward pass.

        DeepSpeed runs its optimizer step inside the trainer's `training_step`, so that method's end would be too late.
        """
        queue = torch.autograd.Variable._execution_engine.queue_callback
        loss.register_hook(lambda _: queue(lambda: self.enter("optimizer")))

    def _handover(self, before: str, output: Any, after: str) -> None:
        """Enter phase `after` now; in the backward pass, enter `before` once the gradient of `output` is ready."""
        self.enter(after)
        tensor = output if isinstance(output, Tensor) else output[0]
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.enter(before))

    def report(self) -> dict[str, float]:
        """Return the values listed at the top of this file, since the last report; every rank must call this."""
        self.enter("other")
        seconds = self.clock.read()
        total = sum(seconds.values())
        counts = {**self.shapes, **dict(zip(COUNTED, self.counts.tolist(), strict=True))}
        self.reset()
        operations = self.flops.of(counts) if self.flops else 0
        used = operations / (total * self.peak_flops) if self.flops else 0.0
        counted = Counter({**counts, "operations": operations})
        gathered = ranks.gather((counted, used, peak_memory(self.device), peak_resident()))
        sums = sum((rank_counts for rank_counts, *_ in gathered), Counter[str]())
        values = {
            "questions_per_second": sums["questions"] / total,
            "tokens_per_second": sums["tokens"] / total,
            "supervised_tokens_per_second": sums["supervised_tokens"] / total,
            "padding": 100 * (1 - sums["tokens"] / sums["positions"]),
            **{f"time_{phase}": 100 * seconds.get(phase, 0.0) / total for phase in PHASES},
            "peak_memory_gib": max(peak for _, _, peak, _ in gathered) / GIB,
            "peak_rss_gib": max(resident for *_, resident in gathered) / GIB,
        }
        if self.flops:
            values["mfu"] = 100 * sum(used for _, used, *_ in gathered) / len(gathered)
            values["tera_flop"] = sums["operations"] / 1e12
        return {name: rounded(value) for name, value in values.items()}


class PhaseClock:
    """Seconds per phase; the clock is in one phase at a time, or stopped (None).

    On CUDA it times the device's stream with events. `switch` never synchronizes; `read` waits for the last event.
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
        """Return the seconds per phase, from the previous call of `read` to the last switch."""
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
