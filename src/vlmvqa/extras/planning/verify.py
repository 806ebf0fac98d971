"""Compare the planned peak memory with a few real training steps on this machine's GPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmvqa.errors import InputError, counted
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.planning.batches import dummy_batch
from vlmvqa.extras.planning.gpus import GIB
from vlmvqa.extras.planning.memory import build_random
from vlmvqa.extras.planning.planner import Planner
from vlmvqa.extras.planning.strategy_memory import Training
from vlmvqa.models.interface import Model
from vlmvqa.training.optimizer import CLASSES

STEPS = 3
MICRO_BATCHES = 2  # at most; more need no more memory


def verify(planner: Planner, checkpointing: bool) -> str:
    """Train for `STEPS` steps with random weights under ddp in one process; return planned and measured peak as text.

    Raises:
        InputError: There is no GPU, or by the plan its memory is too small.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "verify=true runs steps on a GPU, and this machine has none; remove it, or run it on a machine with a GPU"
        )
    device = torch.device("cuda")
    accumulation = min(planner.training.accumulation, MICRO_BATCHES)
    alone = planner.vary(gpus=1, training=replace(planner.training, accumulation=accumulation))
    plan = alone.memory("ddp", planner.rows.rows, checkpointing)
    here = torch.cuda.get_device_properties(device)
    if plan.needed > here.total_memory:
        raise InputError(
            f"one process needs {plan.needed / GIB:.1f} GiB and this {here.name} has {here.total_memory / GIB:.1f}; "
            "lower trainer.per_device_train_batch_size or train less of the model (trainable.language=none)"
        )
    with device:
        model = build_random(planner.settings).train()
    peft_adapters.prepare(model, planner.trainable, planner.adapt, device)
    if checkpointing:
        model.checkpoint_activations()
    model.to(device)
    torch.cuda.reset_peak_memory_stats(device)
    with device:
        batch = dummy_batch(planner.settings, planner.shape, planner.rows.rows)
    train_steps(model, batch, alone.training)
    measured = torch.cuda.max_memory_allocated(device)
    return (
        f"planned {plan.peak / GIB:.2f} GiB (at the {plan.moment}), measured {measured / GIB:.2f} GiB "
        f"({plan.peak / measured - 1:+.1%}): {STEPS} steps of {counted(planner.rows.rows, 'row')} on one {here.name}"
    )


def train_steps(model: Model, batch: dict[str, Tensor], training: Training, steps: int = STEPS) -> None:
    """Run optimizer steps on one repeated batch, like the trainer."""
    device = batch["pixel_values"].device.type
    half = torch.float16 if training.precision == "fp16" else torch.bfloat16
    optimizer = build_optimizer(model, training.optimizer)
    for _ in range(steps):
        for _ in range(training.accumulation):
            with torch.autocast(device, half, enabled=training.mixed):
                loss = model(**batch)["loss"]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def build_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Build the optimizer with transformers' name `name` for the trained parameters."""
    package, class_name, _ = CLASSES[name]
    options: dict[str, Any] = {}
    if package == "torch.optim":
        fused = name.endswith("fused")
        options = {"fused": fused, "foreach": not fused, "weight_decay": 1e-4}
    elif package == "bitsandbytes":
        options = {"optim_bits": 8 if "8bit" in name else 32, "is_paged": name.startswith("paged")}
    module = importlib.import_module(package if package == "torch.optim" else f"{package}.optim")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = getattr(module, class_name)(trained, lr=1e-5, **options)
    return optimizer
