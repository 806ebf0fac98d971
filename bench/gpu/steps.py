"""Optimizer steps: fp32 masters under autocast, or FSDP2 at world size 1, with AdamW; peak memory against the planner.

A row of the micro-batch holds an image with all its questions, with dense attention. Rows x micro-batches as in
docs/fast.md. 48 rows at once recompute activations. "planned_bytes" is the planner's peak for the same lengths
(`extras/planning/`), without its allowances for CUDA and fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from bench import clock, models, shapes
from bench.gpu import machine as gpu_machine
from bench.gpu import shard as gpu_shard
from bench.gpu import sizes as gpu_sizes
from bench.gpu.section import Row, Section, release, timed
from vlmvqa.models.vlm import VLM

if TYPE_CHECKING:
    from vlmvqa.extras.planning.planner import Planner, Training

RECOMPUTED_FROM = 48  # rows


class Setup(NamedTuple):
    """A row of the table: strategy (the planner's name), whether AdamW is fused, rows, and micro-batches."""

    strategy: str
    fused: bool
    rows: int
    accumulation: int
    recomputed: bool

    @property
    def name(self) -> str:
        masters = "FSDP2" if self.strategy == "fsdp" else "fp32 masters"
        optimizer = "fused" if self.fused else "foreach"
        more = ", recomputed" if self.recomputed else ""
        return f"{masters}, {optimizer}, {self.rows} x {self.accumulation}{more}"


def run_steps(section: Section) -> None:
    """Measure the setups, then plan their memory while there is time."""
    measured: list[tuple[Setup, Row]] = []
    for setup in setups(section):
        measured.append((setup, section.row(setup.name, measure, section, setup)))
    with_memory = [(setup, row) for setup, row in measured if row.get("peak_bytes")]
    if with_memory and not section.late:
        planner = make_planner(section, with_memory[0][1]["row_tokens"], with_memory[0][1]["supervised"])
        for setup, row in with_memory:
            if not section.late:
                row["planned_bytes"] = planned_peak(planner, setup)
                row["planned_to_measured"] = row["planned_bytes"] / row["peak_bytes"]
    if not section.cuda:
        section.needs_cuda("peak memory (the resident memory of the process is given)")


def setups(section: Section) -> list[Setup]:
    """Return the rows of the table."""
    small, middle, large = section.sizes.steps
    recomputed = large[0] >= RECOMPUTED_FROM
    return [
        Setup("ddp", True, *middle, False),
        Setup("ddp", False, *middle, False),
        Setup("ddp", True, *small, False),
        Setup("ddp", True, *large, recomputed),
        Setup("fsdp", True, *middle, False),
        Setup("fsdp", False, *middle, False),
        Setup("fsdp", True, *large, recomputed),
    ]


def measure(section: Section, setup: Setup) -> Row:
    """Measure steps of one setup on a new model: time, peak memory and MFU."""
    before = torch.cuda.memory_allocated(section.device) if section.cuda else 0
    model = gpu_sizes.build(section.sizes, section.device, torch.float32, "blockwise_prefix")
    weights = sum(weight.nbytes for weight in model.parameters())
    batches = make_batches(section, model, setup)
    operations = sum(models.needed_flops(model, batch) for batch in batches)
    if setup.recomputed:
        model.checkpoint_activations()
    if setup.strategy == "fsdp":
        gpu_shard.join(section.device)
        gpu_shard.shard(model, section.device, torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, weight_decay=1e-4, fused=setup.fused, foreach=not setup.fused
    )
    release()
    allocated = torch.cuda.memory_allocated(section.device) - before if section.cuda else weights
    supervised = sum(int((batch["labels"] >= 0).sum()) for batch in batches)

    def step() -> None:
        train_step(model, optimizer, batches, supervised)

    with clock.PeakMemory(section.device) as memory:
        step()
        step()  # the optimizer's states exist from here
    seconds = timed(section.device, step, section.sizes.repeats, warm=0)
    row_tokens = batches[0]["labels"].shape[1]
    return {
        "seconds": min(seconds),
        "images_per_second": setup.rows * setup.accumulation / min(seconds),
        "peak_bytes": None if memory.bytes is None else memory.bytes + allocated,
        "row_tokens": row_tokens,
        "supervised": -(-supervised // (setup.rows * setup.accumulation)),
        **gpu_machine.utilisation(section, operations, min(seconds)),
    }


def make_batches(section: Section, model: VLM, setup: Setup) -> list[gpu_sizes.Batch]:
    """Return the micro-batches of a step, of the same length in all setups, so that they share a plan."""
    count, most = setup.rows * setup.accumulation, max(rows * times for rows, times in section.sizes.steps)
    documents = shapes.random_documents(gpu_sizes.SHAPES["vqav2"], most, models.vocabulary(model))
    pixels = models.random_pixels(model, count)
    longest = max(shapes.length(document, model.num_image_tokens) for document in documents)
    multiple = -(-longest // 8) * 8
    rows = [[document] for document in documents[:count]]
    return [
        models.make_batch(model, rows[first : first + setup.rows], pixels, multiple)
        for first in range(0, count, setup.rows)
    ]


def train_step(
    model: VLM, optimizer: torch.optim.Optimizer, batches: Sequence[gpu_sizes.Batch], supervised: int
) -> None:
    """Run a step under autocast: all micro-batches, then the optimizer."""
    device = batches[0]["labels"].device.type
    for batch in batches:
        with torch.autocast(device, torch.bfloat16):
            loss = model(num_items_in_batch=supervised, **batch)["loss"]
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def make_planner(section: Section, row_tokens: int, supervised: int) -> Planner:
    """Return a planner of the measured model and rows; it is imported here because `bench.gpu` needs none of it."""
    from vlmvqa.extras.planning.batches import RowShape
    from vlmvqa.extras.planning.gpus import GPUS
    from vlmvqa.extras.planning.planner import Planner, Rows, Training

    gpu = gpu_sizes.known_gpu(section.device) or GPUS["h200"]
    settings = models.model_settings(section.sizes.name, gpu_sizes.SHAPES["vqav2"], "blockwise_prefix")
    planner = Planner(settings, {}, Rows(1, 1.0, 16), Training("bf16", "adamw_torch"), gpu, gpus=1)
    planner.shape = RowShape(row_tokens, 1, supervised)
    return planner


def training(setup: Setup) -> Training:
    """Return the planner's settings of a setup."""
    from vlmvqa.extras.planning.planner import Training

    return Training("bf16", "adamw_torch_fused" if setup.fused else "adamw_torch", setup.accumulation)


def planned_peak(planner: Planner, setup: Setup) -> int:
    """Return the planned peak in bytes; a pass through the full model takes seconds, and setups share it."""
    return planner.vary(training=training(setup)).memory(setup.strategy, setup.rows, setup.recomputed).peak
