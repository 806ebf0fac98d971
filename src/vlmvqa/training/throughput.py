"""Throughput, where the time goes, memory and MFU: a part of every record of `log.jsonl` and of the loggers.

questions_per_second, tokens_per_second, supervised_tokens_per_second   over all ranks
padding          percent of the token positions that hold none
time_data        percent of the time: reading and packing, to a batch on the device; on CUDA what it could not hide
time_encoder     vision encoder and projector, forward and backward
time_language_model   embeddings and decoder, forward and backward
time_loss        output head and cross-entropy, forward and backward
time_model       instead of these three under torch.compile, where a hook inside would cut the graph
time_optimizer   after the backward pass: waiting for the other ranks' gradients, clipping, the step
time_other       writing the log
peak_memory_gib  the rank that needs most: what CUDA allocated since the last line; on a CPU the process so far
peak_rss_gib     host memory: the most that any rank's process has been resident with so far
mfu              model FLOPs utilisation, percent (`flops.py`)

Evaluations and checkpoints are left out of all of them. Rank 0's time is split.

The time is cut where the work passes from part to part: by hooks on the modules in the forward pass, on the tensors
between them in the backward pass, which a gradient reaches in the opposite order. A clock is always in one phase, so
the shares add up to the whole. (One seam is rough: the embedding's gradient is made last, and counts as encoder.)
"""

from __future__ import annotations

import contextlib
import resource
import sys
import textwrap
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vlmvqa import ranks
from vlmvqa.models.flops import COUNTED, Flops, count, matrix_rate
from vlmvqa.models.interface import PARTS, Model
from vlmvqa.sequence.rows import Batch

PHASES = ("data", "encoder", "language_model", "loss", "optimizer", "other")
COMPILED_PHASES = ("data", "model", "optimizer", "other")
# What is printed of a training step, and with how many digits; `log.jsonl` and the loggers have all of it.
PRINTED = {
    "loss": ("loss {}", 4),
    "learning_rate": ("lr {}", 3),
    "grad_norm": ("grad norm {}", 3),
    "questions_per_second": ("{} questions/s", 3),
}
WIDTH = 99  # columns of a printed line
BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
GIB = 2**30


class Clock:
    """Seconds by phase; it is in one phase at a time, or stopped (None).

    On CUDA the phases are those of the device's stream: events are put into it and read once they have passed, so
    that nobody waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.marks: deque[tuple[str | None, Any]] = deque()  # a phase and its beginning
        self.spare: list[torch.cuda.Event] = []

    @property
    def phase(self) -> str | None:
        return self.marks[-1][0] if self.marks else None

    def switch(self, phase: str | None) -> None:
        """What follows is `phase`."""
        self.marks.append((phase, self._now()))
        while len(self.marks) > 1 and (not self.cuda or self.marks[1][1].query()):
            self._settle()

    def read(self) -> dict[str, float]:
        """The seconds of each phase since the last reading, up to the last switch."""
        if self.cuda and self.marks:
            self.marks[-1][1].synchronize()
        while len(self.marks) > 1:
            self._settle()
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        phase, begin = self.marks.popleft()
        end = self.marks[0][1]
        if phase is not None:
            passed = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            self.seconds[phase] = self.seconds.get(phase, 0.0) + passed
        if self.cuda:
            self.spare.append(begin)


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most allocated since the last call, on a CPU the most resident since the process began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return peak_resident()


def peak_resident() -> int:
    """Bytes of host memory: the most resident since the process began."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


class SpeedMeter(TrainerCallback):
    """Measures a training: a callback of the trainer, which tells it of each micro-batch (`begin`, `backward`).

    Its hooks stay while a training lasts, and do nothing while it is paused.
    """

    def __init__(self, vlm: Model) -> None:
        self.vlm = vlm
        self.device = torch.device("cpu")
        self.clock = Clock(self.device)  # stopped
        self.phases: tuple[str, ...] = PHASES
        self.hooks: list[RemovableHandle] = []
        self.window = getattr(vlm.part("language").module.config, "sliding_window", None)
        self.flops: Flops | None = None
        self.rate = 0.0
        self.forget()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.detach()
        self.device, self.clock = args.device, Clock(args.device)
        self.phases = COMPILED_PHASES if args.torch_compile else PHASES
        if not args.torch_compile:
            self.attach()
        self.flops = self.vlm.flops()
        weights = next(self.vlm.parameters()).dtype
        self.rate = matrix_rate(self.device, torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weights)
        self.forget()
        peak_memory(self.device)
        self.clock.switch("data")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.enter("data")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.clock = Clock(self.device)
        self.detach()

    def attach(self) -> None:
        """Put the hooks on the model's parts; none of them is run again where activations are recomputed."""
        vision, projector, language = (self.vlm.part(name).module for name in PARTS)
        self.hooks = [
            vision.register_forward_pre_hook(lambda *_: self.enter("encoder")),
            projector.register_forward_pre_hook(lambda *_: self.enter("encoder")),  # of cached features
            projector.register_forward_hook(lambda _, __, images: self._between("encoder", images, "language_model")),
            language.register_forward_hook(lambda _, __, hidden: self._between("language_model", hidden, "loss")),
        ]

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def forget(self) -> None:
        """Begin to count anew."""
        self.shapes: Counter[str] = Counter()
        self.counts = torch.zeros(len(COUNTED), dtype=torch.int64)

    def enter(self, phase: str) -> None:
        """What follows is `phase`, unless the clock stands."""
        if self.clock.phase is not None:
            self.clock.switch(phase)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not training."""
        phase = self.clock.phase
        self.clock.switch(None)
        yield
        self.clock.switch(phase)

    def begin(self, batch: Batch) -> None:
        """A micro-batch is here, and goes into the model."""
        self.shapes["positions"] += batch["document"].numel()
        self.shapes["images"] += len(batch["pixel_values" if "pixel_values" in batch else "image_features"])
        self.shapes["encoded"] += len(batch.get("pixel_values", ()))
        self.counts = self.counts.to(batch["role"].device) + count(batch, self.vlm.attention_pattern, self.window)
        self.enter("model" if "model" in self.phases else "language_model")

    def backward(self, loss: Tensor) -> None:
        """The backward pass of this loss comes next; the optimizer's phase begins where it ends.

        Not when the trainer's `training_step` returns: DeepSpeed takes its step in there.
        """
        queue = torch.autograd.Variable._execution_engine.queue_callback
        loss.register_hook(lambda _: queue(lambda: self.enter("optimizer")))

    def _between(self, before: str, handed: Any, after: str) -> None:
        """`handed` is what one part hands to the next; its gradient comes back the other way."""
        self.enter(after)
        passed = handed if isinstance(handed, Tensor) else handed[0]
        if passed.requires_grad:
            passed.register_hook(lambda _: self.enter(before))

    def report(self) -> dict[str, float]:
        """The keys at the top of this file, of all since the last report; every rank has to ask."""
        self.enter("other")
        seconds = self.clock.read()
        total = sum(seconds.values())
        counts = {**self.shapes, **dict(zip(COUNTED, self.counts.tolist(), strict=True))}
        self.forget()
        used = self.flops.of(counts) / (total * self.rate) if self.flops else 0.0
        everyone = ranks.gather((Counter(counts), used, peak_memory(self.device), peak_resident()))
        sums = sum((found for found, *_ in everyone), Counter[str]())
        values = {
            "questions_per_second": sums["questions"] / total,
            "tokens_per_second": sums["tokens"] / total,
            "supervised_tokens_per_second": sums["supervised_tokens"] / total,
            "padding": 100 * (1 - sums["tokens"] / sums["positions"]),
            **{f"time_{phase}": 100 * seconds.get(phase, 0.0) / total for phase in self.phases},
            "peak_memory_gib": max(peak for _, _, peak, _ in everyone) / GIB,
            "peak_rss_gib": max(resident for *_, resident in everyone) / GIB,
        }
        if self.flops:
            values["mfu"] = 100 * sum(used for _, used, *_ in everyone) / len(everyone)
        return {name: rounded(value) for name, value in values.items()}


def rounded(value: float) -> float:
    """Four digits that mean something; a whole number where it has more before the point."""
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def short(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits, without an exponent up to a million."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if 10**digits - 0.5 <= abs(value) < 1e6 else f"{value:.{digits}g}"


def in_words(logs: Mapping[str, Any], names: Iterable[str]) -> str:
    """Those of a log record's values that it has, as they are printed."""
    found = [(name, *PRINTED.get(name, (f"{name} {{}}", 4))) for name in names if name in logs]
    return ", ".join(text.format(short(logs[name], digits)) for name, text, digits in found)


def log_line(logs: Mapping[str, Any], state: TrainerState, left: str = "") -> str:
    """A log record as it is printed: of a training step what `PRINTED` names, of an evaluation all.

    Args:
        left: how long the run takes from here on, where no bar shows it.
    """
    names = PRINTED if "loss" in logs else [name for name in logs if name != "epoch"]
    left = f", {left} left" if left else ""
    line = f"step {state.global_step:,}/{state.max_steps:,}{left}: {in_words(logs, names)}"
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


class Bar(ProgressCallback):
    """The Trainer's progress bar, with the last logged loss, learning rate and speed behind it.

    It starts at the step that a run resumes from, so that the time left is that of the steps made now.
    """

    training_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=BAR_FORMAT
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if self.training_bar is None or not logs:
            return
        self.training_bar.write(log_line(logs, state))
        if "loss" in logs:
            self.training_bar.set_postfix_str(in_words(logs, ("loss", "learning_rate", "questions_per_second")))


class Printer(PrinterCallback):
    """The same lines where there is no bar, with the time left."""

    def __init__(self) -> None:
        self.began, self.first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        made, missing = state.global_step - self.first, state.max_steps - state.global_step
        left = tqdm.format_interval((time.monotonic() - self.began) / made * missing) if made else ""
        print(log_line(logs, state, left), flush=True)


def show_speed(trainer: Trainer) -> None:
    """Put ours in the place of the Trainer's own bar or printer."""
    for theirs, ours in ((ProgressCallback, Bar), (PrinterCallback, Printer)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours)
