"""Check that the built model, strategy and optimizer match the config; stop before the first step otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlmvqa import ranks
from vlmvqa.errors import InputError, counted
from vlmvqa.training.checkpoint_state import num_elements
from vlmvqa.training.optimizer import CLASSES, is_8bit

if TYPE_CHECKING:
    from vlmvqa.training.trainer import VqaTrainer


def check(trainer: VqaTrainer) -> str:
    """Compare what was built with the config and return a table of it.

    Raises:
        InputError: at the first difference.
    """
    parameters = dict(trainer.vlm.named_parameters())
    rows = {
        "strategy": _check_strategy(trainer),
        "parameters": _check_sharding(trainer, parameters),
        "computed in": _check_precision(trainer),
        "attention": trainer.vlm.describe_attention(),
        "optimizer": _check_optimizer(trainer),
        "trained": _check_trained(trainer, parameters),
        "global batch": _describe_batch(trainer),
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def _check_strategy(trainer: VqaTrainer) -> str:
    dist, world = trainer.dist, ranks.world_size()
    if dist.is_zero:
        _require_equal("ZeRO's stage", dist.stage, trainer.engine.zero_optimization_stage())
    elif dist.strategy == "fsdp":
        units = [*trainer.vlm.blocks, trainer.vlm]
        _require_equal("FSDP2 units", len(units), sum(isinstance(unit, FSDPModule) for unit in units))
    elif world > 1:
        wrapped: Any = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
        _require_equal("wrapped by DDP", True, isinstance(wrapped, DistributedDataParallel))
        _require_equal("gradients are views of DDP's buckets", True, wrapped.gradient_as_bucket_view)
    _require_equal("number of ranks", world, trainer.accelerator.num_processes)
    offload = ", offloaded to host memory" if dist.offload else ""
    name = dist.strategy if world > 1 or dist.strategy != "ddp" else "one process"
    return f"{name}{offload}, {counted(world, 'rank')} on {trainer.args.device.type}"


def _check_sharding(trainer: VqaTrainer, parameters: Mapping[str, torch.nn.Parameter]) -> str:
    local, total = 0, 0
    for name, parameter in parameters.items():
        count = num_elements(parameter)
        if trainer.dist.strategy == "fsdp":
            if not isinstance(parameter, DTensor):
                raise InputError(f"dist=fsdp is set, but {name} is not sharded; please report it")
            expected, found = _fsdp_shard_size(parameter), parameter.to_local().numel()
        elif trainer.dist.strategy == "zero3":
            expected = -(-count // ranks.world_size())
            found = int(parameter.ds_tensor.ds_numel)  # type: ignore[attr-defined]
        else:
            expected = found = count
        _require_equal(f"elements of {name} on rank {ranks.rank()}", expected, found)
        local, total = local + found, total + count
    return f"{total:,}, of which {local:,} on this rank" if local != total else f"{total:,}, full on every rank"


def _fsdp_shard_size(parameter: torch.nn.Parameter) -> int:
    """Return the number of elements of this rank's shard: FSDP2 splits the first dimension like `torch.chunk`."""
    rows = len(parameter)
    rows_per_rank = -(-rows // ranks.world_size())  # the last ranks get fewer, or none
    local_rows = min(max(rows - rows_per_rank * ranks.rank(), 0), rows_per_rank)
    return local_rows * (parameter.numel() // rows if rows else 0)


def _check_precision(trainer: VqaTrainer) -> str:
    args = trainer.args
    expected = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if trainer.dist.is_zero:
        engine = trainer.engine
        found = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "no"
    else:
        found = trainer.accelerator.mixed_precision
    _require_equal("mixed precision", expected, found)
    weights = str(trainer.dtype).removeprefix("torch.")
    computed_in = {"bf16": "bfloat16", "fp16": "float16", "no": weights}[expected]
    extras = []
    if args.activation_checkpointing:
        extras.append("activations recomputed")
    if trainer.options.compiled:
        blocks = trainer.vlm.blocks
        _require_equal("compiled blocks", len(blocks), sum(one._compiled_call_impl is not None for one in blocks))
        extras.append(f"{len(blocks)} blocks compiled by {trainer.options.compiled}")
    return ", ".join([f"{computed_in}, weights kept in {weights}", *extras])


def _check_optimizer(trainer: VqaTrainer) -> str:
    optimizer, name = trainer.plain_optimizer(), str(getattr(trainer.args.optim, "value", trainer.args.optim))
    package, class_name, _ = CLASSES[name]
    if trainer.dist.strategy == "fsdp" and package == "bitsandbytes":
        raise InputError(f"trainer.optim={name} cannot step on FSDP2's shards; use adamw_torch_8bit")
    module = type(optimizer).__module__
    found = f"{type(optimizer).__name__} of {package if module.startswith(package) else module}"
    _require_equal("optimizer", f"{class_name} of {package}", found)
    quantized = is_8bit(name)
    states = "fp32 moments"
    if quantized:
        states = "8-bit moments in blocks of 256, fp32 for embeddings and below 4,096 elements"
    if name == "sgd":
        states = "no moments"
    if quantized and package == "bitsandbytes":
        _require_equal("bits of the optimizer's states", 8, optimizer.args.optim_bits)  # type: ignore[attr-defined]
    bounds = [f"norm clipped to {trainer.clipping.max_norm:g}"] if trainer.clipping.max_norm else []
    if trainer.clipping.percentile:
        bounds.append(f"to the {trainer.clipping.percentile}th percentile of the last 100")
    replaced = ""
    if quantized and trainer.dist.strategy == "fsdp":
        replaced = " (torchao's: bitsandbytes' adamw_bnb_8bit cannot step on shards)"
    return ", ".join([f"{name}{replaced}", states, *bounds])


def _check_trained(trainer: VqaTrainer, parameters: Mapping[str, torch.nn.Parameter]) -> str:
    trained = [p for p in parameters.values() if p.requires_grad]
    count = sum(num_elements(p) for p in trained)
    found = trainer.full_state.optimized_elements()
    if trainer.dist.is_zero:
        # Partitions are padded to equal lengths, so all ranks together hold at least the trained parameters.
        found = min(sum(ranks.gather(found)), count)
    _require_equal("parameters in the optimizer", count, found)
    return f"{count:,} parameters in {len(trained)} tensors"


def _describe_batch(trainer: VqaTrainer) -> str:
    args = trainer.args
    factors = f"{args.per_device_train_batch_size} a rank x {args.gradient_accumulation_steps} accumulated"
    return f"{counted(trainer.global_batch, 'row')} ({factors} x {counted(ranks.world_size(), 'rank')})"


def _require_equal(name: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise InputError(f"{name}: the config asks for {expected}, but {found} was built; please report it")
