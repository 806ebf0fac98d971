"""Measurements that need several GPUs: `torchrun --nproc-per-node N -m bench.gpu`.

Bandwidths are those of the "bus", as in nccl-tests: the bytes that each rank sends, over the time. The recipe's step is
one micro-batch of the published recipe per rank: 6 rows of a question, recomputed activations, dense attention. The
fast step has a packed row of 4,096 tokens with FlexAttention and compiled blocks, and the FSDP keys of
`vlm_vqa_4xa10g_fast`: gradients reduced in bfloat16, blocks kept gathered, a unit for the embedding. Both use fused
AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
import torch.distributed as dist

from bench import ladder, shapes
from bench.gpu import ladder as gpu_ladder
from bench.gpu import profile as gpu_profile
from bench.gpu import steps as gpu_steps
from bench.gpu.section import Row, Section, timed
from bench.gpu.shard import shard


def bandwidth(section: Section) -> None:
    """Measure all-gather in bfloat16 and reduce-scatter in fp32, as FSDP2 runs them."""
    for size in section.sizes.copies:
        part, full = _buffers(section, size, torch.bfloat16)
        section.row(f"all-gather, {size:,} bytes", _rate, section, dist.all_gather_into_tensor, full, part)
        part, full = _buffers(section, size, torch.float32)
        section.row(f"reduce-scatter, {size:,} bytes", _rate, section, dist.reduce_scatter_tensor, part, full)


def _buffers(section: Section, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a rank's part, and all ranks' parts, which have about `size` bytes."""
    world = dist.get_world_size()
    part = torch.ones(-(-size // (dtype.itemsize * world)), dtype=dtype, device=section.device)
    return part, part.repeat(world)


def _rate(section: Section, collective: Callable[..., object], output: torch.Tensor, given: torch.Tensor) -> Row:
    world, size = dist.get_world_size(), max(output.nbytes, given.nbytes)
    seconds = min(timed(section.device, lambda: collective(output, given), 5, warm=2))
    return {"seconds": seconds, "bytes_per_second": size * (world - 1) / world / seconds}


def recipe_step(section: Section) -> None:
    """Measure a step of the published recipe."""
    job = gpu_ladder.make_job(section)
    alone = [[document] for document in shapes.apart(job.documents)]
    batch = gpu_ladder.first_batch(job, [alone[: gpu_ladder.RECIPE_ROWS]], 8)
    _measure(section, "recipe", job, batch, [gpu_ladder.recomputed])


def fast_step(section: Section) -> None:
    """Measure a step with packed rows, FlexAttention and compiled blocks."""
    job = gpu_ladder.make_job(section)
    if not section.cuda:
        section.notes.append("packed rows use dense attention on the CPU, and torch.compile does nothing")
    compiling = [ladder.flex, ladder.compiled] if section.cuda else [gpu_ladder.uncompiled]
    rows = gpu_ladder.packed_micro_batches(section, job)[1]
    batch = gpu_ladder.first_batch(job, rows, section.sizes.row_tokens)
    settings: list[ladder.Setting] = [*compiling, gpu_ladder.recomputed]
    _measure(section, "packed flex, compiled, recomputed", job, batch, settings, fast=True)


def _measure(
    section: Section,
    name: str,
    job: ladder.Job,
    batch: dict[str, torch.Tensor],
    settings: list[ladder.Setting],
    fast: bool = False,
) -> None:
    model = job.model.float()
    questions = _questions(batch) * dist.get_world_size()
    shard(model, section.device, torch.bfloat16, fast)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        gpu_steps.train_step(model, optimizer, [batch], questions)

    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting(model))
        section.row(name, _timed_step, section, step, questions)
        section.row(f"{name}: overlap", overlap, section, step)


def _questions(batch: dict[str, torch.Tensor]) -> int:
    """Return the questions of a batch: the last prompt token of each predicts its first answer token."""
    supervised = batch["labels"] >= 0
    return int((supervised & (batch["role"] == 1)).sum())


def _timed_step(section: Section, step: Callable[[], None], questions: int) -> Row:
    seconds = timed(section.device, step, section.sizes.repeats, warm=2)
    return {"seconds": min(seconds), "questions_per_second": questions / min(seconds)}


def overlap(section: Section, step: Callable[[], None]) -> Row:
    """Return the share of the communication's time in which other kernels run."""
    events, seconds = gpu_profile.trace(section, step)
    if not section.cuda:
        section.needs_cuda("share of communication that is overlapped")
        return {"step_seconds": seconds}
    kinds: tuple[list[gpu_profile.Interval], list[gpu_profile.Interval]] = ([], [])
    for event in events:
        kinds["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    others, communication = kinds
    spent = gpu_profile.length(gpu_profile.union(communication))
    return {
        "communication_seconds": spent / 1e6,
        "overlapped": gpu_profile.overlap(communication, others) / spent if spent else None,
        "step_seconds": seconds,
    }
