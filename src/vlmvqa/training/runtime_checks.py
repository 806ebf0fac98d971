"""What was asked for is what runs, or the run stops before its first step.

`refuse` knows the combinations that cannot work and names the nearest one that does, before anything is built;
`check` looks at what was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlmvqa import ranks
from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError, counted
from vlmvqa.models.interface import num_weights

if TYPE_CHECKING:
    from vlmvqa.training.trainer import VqaTrainer

# What an optimizer's class is called, and the package and extra it comes from.
CLASSES = {
    "adamw_torch": ("torch.optim", "AdamW", None),
    "adamw_torch_fused": ("torch.optim", "AdamW", None),
    "adamw_bnb_8bit": ("bitsandbytes", "AdamW", "8bit"),
    "adamw_torch_8bit": ("torchao", "AdamW8bit", "8bit"),
    "paged_adamw_32bit": ("bitsandbytes", "AdamW", "8bit"),
    "paged_adamw_8bit": ("bitsandbytes", "AdamW", "8bit"),
    "sgd": ("torch.optim", "SGD", None),
}


def optimizer_for(asked: str, dist: DistSettings) -> str:
    """bitsandbytes' kernels know no shards: under FSDP2 torchao's 8-bit AdamW, of the same blocks, takes over."""
    return "adamw_torch_8bit" if dist.strategy == "fsdp" and asked == "adamw_bnb_8bit" else asked


def check(trainer: VqaTrainer) -> str:
    """Compare what was built with what was asked for; a table of it.

    Raises:
        InputError: at the first difference.
    """
    parameters = dict(trainer.vlm.named_parameters())
    rows = {
        "strategy": _strategy(trainer),
        "parameters": _held(trainer, parameters),
        "computed in": _computed_in(trainer),
        "attention": trainer.vlm.describe_attention(),
        "optimizer": _optimizer(trainer),
        "trained": _trained(trainer, parameters),
        "global batch": _batch(trainer),
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def _strategy(trainer: VqaTrainer) -> str:
    dist, world = trainer.dist, ranks.world_size()
    if dist.is_zero:
        stage = trainer.engine.zero_optimization_stage()
        _same("ZeRO's stage", dist.stage, stage)
    elif dist.strategy == "fsdp":
        blocks = [*trainer.vlm.blocks, trainer.vlm]
        _same("units that FSDP2 holds", len(blocks), sum(isinstance(block, FSDPModule) for block in blocks))
    elif world > 1:
        wrapped: Any = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
        _same("a model that DDP wraps", True, isinstance(wrapped, DistributedDataParallel))
        _same("gradients that are views of DDP's buckets", True, wrapped.gradient_as_bucket_view)
    _same("ranks that train together", world, trainer.accelerator.num_processes)
    offload = ", offloaded to host memory" if dist.offload else ""
    name = dist.strategy if world > 1 or dist.strategy != "ddp" else "one process"
    return f"{name}{offload}, {counted(world, 'rank')} on {trainer.args.device.type}"


def _held(trainer: VqaTrainer, parameters: Mapping[str, torch.nn.Parameter]) -> str:
    total, world = 0, ranks.world_size()
    local = 0
    for name, parameter in parameters.items():
        if trainer.dist.strategy == "fsdp":
            if not isinstance(parameter, DTensor):
                raise InputError(f"dist=fsdp was asked for, but {name} is not sharded; please report it")
            rows = len(parameter)
            share = -(-rows // world)  # torch.chunk: equal pieces, the last ones smaller or empty
            mine = min(max(rows - share * ranks.rank(), 0), share)
            expected = mine * (parameter.numel() // rows if rows else 0)
            _same(f"elements of {name} on rank {ranks.rank()}", expected, parameter.to_local().numel())
            local += expected
            total += parameter.numel()
        elif trainer.dist.strategy == "zero3":
            whole, mine = int(parameter.ds_numel), int(parameter.ds_tensor.ds_numel)  # type: ignore[attr-defined]
            _same(f"elements of {name} on rank {ranks.rank()}", -(-whole // world), mine)
            local, total = local + mine, total + whole
        else:
            local, total = local + num_weights(parameter), total + num_weights(parameter)
    return f"{total:,}, of which {local:,} on this rank" if local != total else f"{total:,}, whole on every rank"


def _computed_in(trainer: VqaTrainer) -> str:
    args = trainer.args
    asked = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if trainer.dist.is_zero:
        engine = trainer.engine
        now = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "no"
    else:
        now = trainer.accelerator.mixed_precision
    _same("mixed precision", asked, now)
    name = {"bf16": "bfloat16", "fp16": "float16", "no": str(trainer.dtype).removeprefix("torch.")}[asked]
    extras = []
    if args.activation_checkpointing:
        extras.append("activations recomputed")
    if args.torch_compile:
        extras.append(f"compiled by {args.torch_compile_backend}")
    return ", ".join([f"{name}, weights kept in {str(trainer.dtype).removeprefix('torch.')}", *extras])


def _optimizer(trainer: VqaTrainer) -> str:
    optimizer, asked = trainer.plain_optimizer(), str(getattr(trainer.args.optim, "value", trainer.args.optim))
    package, kind, _ = CLASSES[asked]
    if trainer.dist.strategy == "fsdp" and package == "bitsandbytes":
        raise InputError(f"trainer.optim={asked} cannot step on FSDP2's shards; use adamw_torch_8bit")
    found = type(optimizer)
    _same("the optimizer", f"{kind} of {package}", f"{found.__name__} of {_package(found.__module__, package)}")
    eight = "8bit" in asked
    states = "8-bit moments in blocks of 256, fp32 below 4,096 elements" if eight else "fp32 moments"
    if asked == "sgd":
        states = "no moments"
    if eight and package == "bitsandbytes":
        _same("bits of the optimizer's states", 8, optimizer.args.optim_bits)  # type: ignore[attr-defined]
    bounds = [f"norm clipped to {trainer.clipping.max_norm:g}"] if trainer.clipping.max_norm else []
    if trainer.clipping.percentile:
        bounds.append(f"to the {trainer.clipping.percentile}th percentile of the last 100")
    replaced = ""
    if eight and trainer.dist.strategy == "fsdp":
        replaced = " (torchao's: bitsandbytes' adamw_bnb_8bit cannot step on shards)"
    return ", ".join([f"{asked}{replaced}", states, *bounds])


def _package(module: str, expected: str) -> str:
    return expected if module.startswith(expected) else module


def _trained(trainer: VqaTrainer, parameters: Mapping[str, torch.nn.Parameter]) -> str:
    wanted = [p for p in parameters.values() if p.requires_grad]
    count = sum(int(getattr(p, "ds_numel", p.numel())) for p in wanted)
    held = trainer.whole.elements()
    if trainer.dist.is_zero:
        # Partitions are padded to equal length: never less than what trains, together.
        _same("parameters that the optimizer holds", True, sum(ranks.gather(held)) >= count)
    else:
        _same("parameters that the optimizer holds", count, held)
    return f"{count:,} parameters in {len(wanted)} tensors"


def _batch(trainer: VqaTrainer) -> str:
    args = trainer.args
    parts = f"{args.per_device_train_batch_size} a rank x {args.gradient_accumulation_steps} accumulated"
    return f"{counted(trainer.global_batch, 'row')} ({parts} x {counted(ranks.world_size(), 'rank')})"


def _same(what: str, asked: Any, found: Any) -> None:
    if asked != found:
        raise InputError(f"{what}: {asked} was asked for, {found} would run; please report it with the command")
