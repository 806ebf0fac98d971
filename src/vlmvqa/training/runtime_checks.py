"""What was asked for is what runs, or the run stops before its first step.

`refuse` knows the combinations that cannot work and names the nearest one that does, before anything is built;
`check` looks at what was built.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlmvqa import ranks
from vlmvqa.config.trainer_arguments import problems
from vlmvqa.errors import InputError, counted, suggest
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings, elements
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM
from vlmvqa.models.attention import SOFTCAP
from vlmvqa.models.checkpoint import Settings
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.sequence.masks import SHAREABLE
from vlmvqa.training import callbacks
from vlmvqa.training.distributed import DistSettings
from vlmvqa.training.optimizer_state import OPTIMIZERS

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


@dataclass(frozen=True)
class Asked:
    """What a command asks for, as far as it can clash.

    Attributes:
        trainer: the `trainer` group.
        questions_per_row, row_tokens: `data.questions_per_row` and `data.row_tokens`.
        features: whether the encoder's output is cached (`data.feature_cache`).
        trained_vision: `trainable.vision`.
        gpu: whether it trains on one.
        bf16_works: whether the device computes in bfloat16.
        adapt: the `adapt` group, where there are adapters.
    """

    dist: DistSettings
    trainer: Mapping[str, Any]
    model: Settings
    questions_per_row: int | None = None
    row_tokens: int | None = None
    features: bool = False
    trained_vision: str = "all"
    gpu: bool = False
    bf16_works: bool = True
    adapt: AdapterSettings | None = None


def optimizer_for(asked: str, dist: DistSettings) -> str:
    """bitsandbytes' kernels know no shards: under FSDP2 torchao's 8-bit AdamW, of the same blocks, takes over."""
    return "adamw_torch_8bit" if dist.strategy == "fsdp" and asked == "adamw_bnb_8bit" else asked


def refuse(asked: Asked) -> None:
    """Stop at a combination that cannot work.

    Raises:
        InputError: with the nearest one that does.
    """
    for sentence in _problems(asked):
        raise InputError(sentence)


def _problems(asked: Asked) -> Iterator[str]:
    trainer, dist, model = asked.trainer, asked.dist, asked.model
    yield from problems(trainer)
    optim = optimizer_for(trainer.get("optim", "adamw_torch"), dist)
    if optim not in CLASSES:
        yield (
            f"trainer.optim={optim} is not one whose states are saved under every strategy; use one of "
            f"{', '.join(OPTIMIZERS)}{suggest(optim, OPTIMIZERS)}"
        )
    package, _, extra = CLASSES[optim]
    if extra and importlib.util.find_spec(package) is None:
        yield f"trainer.optim={optim} needs {package}; install it with: pip install 'vlmvqa[{extra}]'"
    if optim.startswith("paged") and not asked.gpu:
        yield f"trainer.optim={optim}: its pages are CUDA's, so it needs a GPU; use adamw_bnb_8bit or adamw_torch"
    if optim.startswith("paged") and dist.strategy == "fsdp":
        yield f"trainer.optim={optim} cannot step on FSDP2's shards; use adamw_torch_8bit, or dist=fsdp_offload"
    if dist.is_zero and importlib.util.find_spec("deepspeed") is None:
        install = "install it with: pip install 'vlmvqa[deepspeed]'"
        yield f"dist={dist.strategy} needs DeepSpeed; {install}, or use dist=fsdp"
    if dist.is_zero and optim == "adamw_torch_8bit":
        yield f"trainer.optim=adamw_torch_8bit does not step on {dist.strategy}'s partitions; use adamw_bnb_8bit"
    if dist.strategy == "zero3" and any(trainer.get(f"torch_compile{more}") for more in ("", "_backend", "_mode")):
        yield "trainer.torch_compile=true: the tied output matrix is not traced under zero3; use dist=fsdp or zero2"
    if dist.is_zero and trainer.get("use_cpu") and torch.cuda.is_available():
        yield (
            f"trainer.use_cpu=true: DeepSpeed takes the GPU it finds all the same; hide it with CUDA_VISIBLE_DEVICES=, "
            f"or use dist=ddp instead of {dist.strategy}"
        )
    if trainer.get("fp16") and not asked.gpu:
        yield "trainer.fp16=true needs a GPU; use trainer.bf16=true or neither on the CPU"
    if trainer.get("fp16") and dist.strategy == "fsdp":
        yield "trainer.fp16=true does not work under dist=fsdp; use trainer.bf16=true, or dist=zero2 without it"
    if trainer.get("bf16") and not asked.bf16_works:
        yield "trainer.bf16=true: this card does not compute in bfloat16; use trainer.fp16=true under dist=ddp or zero2"
    if asked.adapt is not None and asked.adapt.bits and dist.strategy in ("fsdp", "zero3"):
        yield f"adapt.bits={asked.adapt.bits}: {dist.strategy} cannot shard weights of 4 bits; use dist=ddp or zero2"
    if model.dtype != "float32" and dist.is_zero and not trainer.get("bf16"):
        yield f"model.dtype={model.dtype} under {dist.strategy} needs trainer.bf16=true"
    if asked.features and asked.trained_vision != "none":
        yield (
            f"trainable.vision={asked.trained_vision}: an encoder whose output is cached cannot train; set "
            "trainable.vision=none, or leave data.feature_cache out"
        )
    if model.dtype == "float16" and asked.adapt is None:
        yield "model.dtype=float16: weights that train are kept in float32; set model.dtype=float32 (trainer.fp16=true)"
    yield from callbacks.problems(trainer.get("report_to"))
    if trainer.get("average_tokens_across_devices") is False:
        yield "trainer.average_tokens_across_devices=false would weigh ranks, not tokens, the same; leave it out"
    if asked.adapt is not None:
        yield from _adapter_problems(asked, asked.adapt)
    yield from (
        _pretrained_problems(asked, model) if isinstance(model, PretrainedSettings) else _own_problems(asked, model)
    )


def _adapter_problems(asked: Asked, adapt: AdapterSettings) -> Iterator[str]:
    dist, dtype = asked.dist, asked.model.dtype
    for package in ("peft", *(["bitsandbytes"] if adapt.bits else [])):
        if importlib.util.find_spec(package) is None:
            yield f"adapt={adapt.method} needs {package}; install it with: pip install 'vlmvqa[adapters]'"
    if dist.strategy == "fsdp" and dtype != "float32":
        yield (
            f"model.dtype={dtype} under fsdp, which shards a block in one type, and adapters are float32; set "
            "model.dtype=float32 (trainer.bf16=true still computes in bfloat16)"
        )
    if adapt.bits and asked.trainer.get("fp16") and dtype == "bfloat16":
        # 4-bit layers answer in the type they are asked in, and autocast joins no bfloat16 under fp16.
        yield "trainer.fp16=true over bfloat16 weights beside 4-bit ones fails; set model.dtype=float32 or float16"
    if adapt.bits and adapt.compute_dtype == "bfloat16" and not asked.bf16_works:
        yield "adapt.compute_dtype=bfloat16: this card does not compute in bfloat16; use adapt.compute_dtype=float16"
    if asked.features and any(target.startswith(("vision", "*")) for target in adapt.targets):
        yield "data.feature_cache: an encoder with adapters is at work in every step; leave them out"


def _own_problems(asked: Asked, model: ModelSettings) -> Iterator[str]:
    if model.language.attention == "flex" and not asked.gpu:
        yield (
            "model.language.attention=flex: FlexAttention has no backward pass on the CPU; "
            "use model.language.attention=dense"
        )
    if model.language.loss == "fused" and not asked.gpu:
        yield "model.language.loss=fused: its kernel needs a GPU; use model.language.loss=chunked"
    if model.language.loss == "fused" and importlib.util.find_spec("cut_cross_entropy") is None:
        yield "model.language.loss=fused needs cut-cross-entropy; install it with: pip install 'vlmvqa[fused]'"
    if model.mode not in SHAREABLE and asked.questions_per_row not in (None, 1):
        yield (
            f"model.mode={model.mode} lets the image see its question, so data.questions_per_row="
            f"{asked.questions_per_row} questions cannot share one; set data.questions_per_row=1, or "
            "model.mode=blockwise_prefix"
        )


def _pretrained_problems(asked: Asked, model: PretrainedSettings) -> Iterator[str]:
    name = model.pretrained
    if asked.questions_per_row not in (None, 1):
        yield (
            f"{name} answers a question a row, and data.questions_per_row={asked.questions_per_row} was asked for; "
            "set data.questions_per_row=1"
        )
    if asked.row_tokens is not None:
        yield f"data.row_tokens={asked.row_tokens}: rows of {name} are not packed; set data.row_tokens=null"
    if asked.features:
        yield f"data.feature_cache: {name} is trained with its own encoder at work; leave them out"


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
        "attention": _attention(trainer),
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
            local, total = local + elements(parameter), total + elements(parameter)
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


def _attention(trainer: VqaTrainer) -> str:
    vlm = trainer.vlm
    if isinstance(vlm, PretrainedVLM):
        return f"the library's own ({vlm.attention})"
    language = vlm.language
    runs = language.decoder.config._attn_implementation
    _same("the attention", "flex_attention" if language.attention == "flex" else "dense", _dense_or(runs))
    return f"{vlm.mode}, {language.attention} ({runs})"


def _dense_or(implementation: str) -> str:
    return "dense" if implementation in (SOFTCAP, "sdpa") else implementation


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
