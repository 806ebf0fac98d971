"""One optimizer step under the profiler and PyTorch's synchronization warnings, and the time of the masks."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu import ladder as gpu_ladder
from bench.gpu import steps as gpu_steps
from bench.gpu.section import Row, Section, timed
from vlmvqa.sequence import masks

SYNCHRONIZES = "synchronizing CUDA operation"
TOP = 10  # kernels listed
Interval = tuple[float, float]


def profile_step(section: Section) -> None:
    """Profile a step of one packed row: fp32 masters, autocast, fused AdamW, FlexAttention."""
    if not section.cuda:
        section.notes.append("the row uses dense attention on the CPU; the profiler lists operators, not kernels")
    job = gpu_ladder.make_job(section)
    model = job.model.float()
    if section.cuda:
        model.language.set_attention("flex")
    rows = gpu_ladder.packed_micro_batches(section, job)[1]
    batch = gpu_ladder.first_batch(job, rows, section.sizes.row_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        gpu_steps.train_step(model, optimizer, [batch], 1)

    def build_masks() -> object:
        tokens, window = model.tokens(batch), model.language.config.sliding_window
        if section.cuda:
            return [masks.block_mask(tokens, seen) for seen in (None, window)]
        return [masks.dense_mask(tokens, tokens, seen) for seen in (None, window)]

    step()
    section.row("synchronizations", synchronizations, section, step)
    section.row("profile", profiled, section, step)
    section.row("masks", lambda: {"seconds": min(timed(section.device, build_masks, section.sizes.repeats))})


def synchronizations(section: Section, step: Callable[[], None]) -> Row:
    """Count the operations of a step that wait for the GPU, by the line of code that called them."""
    if not section.cuda:
        section.needs_cuda("synchronizations")
        step()
        return {"skipped": "needs CUDA"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{one.filename}:{one.lineno}" for one in caught if SYNCHRONIZES in str(one.message))
    return {"synchronizations": sum(lines.values()), "lines": dict(lines.most_common())}


def profiled(section: Section, step: Callable[[], None]) -> Row:
    """Return the number of kernels, the share of the step in which one runs, and those that take the most time."""
    events, seconds = trace(section, step)
    if not section.cuda:
        section.needs_cuda("share of the step in which the GPU is busy")
        return {"seconds": seconds, "operators": len(events), "most": most_time(events)}
    intervals = [(event.time_range.start, event.time_range.end) for event in events]
    span = max(end for _, end in intervals) - min(start for start, _ in intervals)
    busy = length(union(intervals))
    return {
        "seconds": span / 1e6,
        "gpu_busy": busy / span,
        "kernels": len(events),
        "most": most_time(events),
    }


def trace(section: Section, step: Callable[[], None]) -> tuple[list[Any], float]:
    """Return the kernels of a call (on a CPU its operators), and its seconds; times are in microseconds."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if section.cuda else [])]
    with profile(activities=activities) as profiler:
        (seconds,) = timed(section.device, step, 1, warm=0)
    kind = DeviceType.CUDA if section.cuda else DeviceType.CPU
    # An annotation on the GPU's timeline spans the kernels that it names.
    found = [one for one in profiler.events() if one.device_type == kind and not one.is_user_annotation]
    return found, seconds


def most_time(events: Iterable[Any]) -> dict[str, float]:
    """Return the seconds of the kernels that take the most time together, by name."""
    total: Counter[str] = Counter()
    for event in events:
        total[event.name[:80]] += event.time_range.end - event.time_range.start
    return {name: microseconds / 1e6 for name, microseconds in total.most_common(TOP)}


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals that cover the same times, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def overlap(ones: Iterable[Interval], others: Iterable[Interval]) -> float:
    """Return the time in which both an interval of one kind and one of the other kind run."""
    ones, others = union(ones), union(others)
    return length(ones) + length(others) - length(union([*ones, *others]))
