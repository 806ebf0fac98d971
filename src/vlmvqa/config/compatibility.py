"""Combinations of settings that cannot work: tables of conditions and error messages.

Each message names the nearest combination that works. An extra keeps its own table in a function `conflicts`, which is
imported only when a config uses the extra. Training calls `check` before anything is loaded or written.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmvqa.config.schema import AnyModelSettings, DistSettings, TrainConfig
from vlmvqa.errors import InputError, suggest
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.sequence.rows import SHAREABLE
from vlmvqa.training.optimizer import CLASSES, OPTIMIZERS, optimizer_for

# Whether the run combines them, and the error message.
Conflicts = Sequence[tuple[Any, str]]


@dataclass(frozen=True)
class RunRequest:
    """The settings of a run that can contradict each other or the device.

    Attributes:
        trainer: the `trainer` group.
        questions_per_row, row_tokens: `data.questions_per_row` and `data.row_tokens`.
        copy_images: `copy_images`.
        cached: whether the encoder's output is cached (`data.feature_cache`).
        tiles, resize: `data.tiles` and `data.resize`.
        trained_vision: `trainable.vision`.
        gpu: whether the run trains on a GPU.
        bf16_works: whether the device computes in bfloat16.
        adapt: the `adapt` group, if there are adapters.
        accelerate_precision: the mixed precision that accelerate's config file sets.
        static_cache: `decoding.static_cache`.
    """

    dist: DistSettings
    trainer: Any
    model: AnyModelSettings
    questions_per_row: int | None = None
    row_tokens: int | None = None
    copy_images: bool = False
    cached: bool = False
    trained_vision: str = "all"
    gpu: bool = False
    bf16_works: bool = True
    adapt: Any = None
    accelerate_precision: str = "no"
    static_cache: bool = False
    tiles: Any = None
    resize: str = "squash"


def missing(package: str) -> bool:
    """Return whether a package is not installed."""
    return importlib.util.find_spec(package) is None


def check(config: TrainConfig, dist: DistSettings) -> None:
    """Raise an InputError if the settings of a run contradict each other or the device."""
    gpu = torch.cuda.is_available() and not config.trainer.get("use_cpu")
    refuse(
        RunRequest(
            dist,
            config.trainer,
            config.model,
            config.data.questions_per_row,
            config.data.row_tokens,
            config.copy_images,
            config.data.feature_cache is not None,
            str(config.trainable["vision"]),
            gpu,
            torch.cuda.is_bf16_supported(including_emulation=False) if gpu else True,
            config.adapt,
            os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
            config.decoding.static_cache,
            config.data.tiles,
            config.data.resize,
        )
    )


def refuse(r: RunRequest) -> None:
    """Raise an InputError for the first conflict. An extra's come first: the core's may be a consequence of them."""
    extras = {
        "vlmvqa.extras.loggers.tracking": r.trainer.get("report_to") not in (None, "none"),
        "vlmvqa.extras.adapters.compatibility": r.adapt is not None,
        "vlmvqa.extras.pretrained.compatibility": not isinstance(r.model, ModelSettings),
        "vlmvqa.extras.vision.compatibility": r.tiles is not None or r.resize == "letterbox",
        "vlmvqa.training.block_compilation": any(map(r.trainer.get, ("torch_compile_backend", "torch_compile_mode"))),
    }
    modules = [importlib.import_module(module) for module, used in extras.items() if used]
    for conflicts in [*(module.conflicts for module in modules), run_conflicts, model_conflicts]:
        for condition, message in conflicts(r):
            if condition:
                raise InputError(message)


def run_conflicts(r: RunRequest) -> Conflicts:
    """Return the conflicts of optimizer, strategy, precision, data and loss."""
    optim = optimizer_for(r.trainer.get("optim", "adamw_torch"), r.dist)
    return [
        *_optimizer_conflicts(r, optim),
        *_strategy_conflicts(r, optim),
        *_precision_conflicts(r),
        (
            r.cached and r.trained_vision != "none",
            f"trainable.vision={r.trained_vision}: an encoder whose output is cached cannot train; set "
            "trainable.vision=none, or leave data.feature_cache out",
        ),
        (
            r.trainer.get("average_tokens_across_devices") is False,
            "trainer.average_tokens_across_devices=false would weigh ranks equally, not tokens; leave it out",
        ),
    ]


def _optimizer_conflicts(r: RunRequest, optim: str) -> Conflicts:
    package, _, extra = CLASSES.get(optim, ("", "", None))
    return [
        (
            optim not in CLASSES,
            f"trainer.optim={optim} has no states that every strategy can save; use one of {', '.join(OPTIMIZERS)}"
            f"{suggest(optim, OPTIMIZERS)}",
        ),
        (
            extra and missing(package),
            f"trainer.optim={optim} needs {package}; install it with: pip install 'vlmvqa[{extra}]'",
        ),
        (
            optim.startswith("paged") and not r.gpu,
            f"trainer.optim={optim}: paged states need CUDA, so it needs a GPU; use adamw_bnb_8bit or adamw_torch",
        ),
        (
            optim.startswith("paged") and r.dist.strategy == "fsdp",
            f"trainer.optim={optim} cannot step on FSDP2's shards; use adamw_torch_8bit, or dist=fsdp_offload",
        ),
    ]


def _strategy_conflicts(r: RunRequest, optim: str) -> Conflicts:
    strategy, is_zero = r.dist.strategy, r.dist.is_zero
    return [
        (
            strategy != "fsdp" and r.dist.reduce_dtype != "float32",
            f"dist.reduce_dtype={r.dist.reduce_dtype} is for fsdp, not for {strategy}; leave it out, or use dist=fsdp",
        ),
        (
            strategy != "fsdp" and r.dist.keep_gathered,
            f"dist.keep_gathered=true is for fsdp, not for {strategy}; leave it out, or use dist=fsdp",
        ),
        (
            r.dist.offload and r.dist.keep_gathered,
            "dist.keep_gathered=true needs the memory that dist.offload=true saves; set one of them to false",
        ),
        (
            is_zero and missing("deepspeed"),
            f"dist={strategy} needs DeepSpeed; install it with: pip install 'vlmvqa[deepspeed]', or use dist=fsdp",
        ),
        (
            is_zero and optim == "adamw_torch_8bit",
            f"trainer.optim=adamw_torch_8bit does not step on {strategy}'s partitions; use adamw_bnb_8bit",
        ),
        (
            is_zero and r.trainer.get("use_cpu") and torch.cuda.is_available(),
            "trainer.use_cpu=true: DeepSpeed uses a GPU if there is one; hide it with CUDA_VISIBLE_DEVICES=, or "
            f"use dist=ddp instead of {strategy}",
        ),
    ]


def _precision_conflicts(r: RunRequest) -> Conflicts:
    fp16, bf16 = r.trainer.get("fp16"), r.trainer.get("bf16")
    precision = "bf16" if bf16 else "fp16" if fp16 else "no"
    return [
        (
            r.accelerate_precision not in ("no", precision),
            f"accelerate's config file sets {r.accelerate_precision}, the run sets {precision}; add "
            f"trainer.{r.accelerate_precision}=true",
        ),
        (fp16 and not r.gpu, "trainer.fp16=true needs a GPU; use trainer.bf16=true or neither on the CPU"),
        (
            fp16 and r.dist.strategy == "fsdp",
            "trainer.fp16=true does not work under dist=fsdp; use trainer.bf16=true, or dist=zero2 without it",
        ),
        (
            bf16 and not r.bf16_works,
            "trainer.bf16=true: this card does not compute in bfloat16; use trainer.fp16=true under dist=ddp or zero2",
        ),
        (
            r.model.dtype != "float32" and r.dist.is_zero and not bf16,
            f"model.dtype={r.model.dtype} under {r.dist.strategy} needs trainer.bf16=true",
        ),
        (
            r.model.dtype == "float16" and r.adapt is None,
            "model.dtype=float16: weights that train are kept in float32; set model.dtype=float32 (trainer.fp16=true)",
        ),
    ]


def model_conflicts(r: RunRequest) -> Conflicts:
    """Return the conflicts of our own model."""
    if not isinstance(r.model, ModelSettings):
        return []
    attention, loss, pattern = r.model.language.attention, r.model.language.loss, r.model.attention_pattern
    return [
        (
            attention == "flex" and not r.gpu,
            "model.language.attention=flex: FlexAttention has no backward pass on the CPU; use "
            "model.language.attention=dense",
        ),
        (
            loss == "fused" and not r.gpu,
            "model.language.loss=fused: its kernel needs a GPU; use model.language.loss=chunked",
        ),
        (
            loss == "fused" and missing("cut_cross_entropy"),
            "model.language.loss=fused needs cut-cross-entropy; install it with: pip install 'vlmvqa[fused]'",
        ),
        (
            pattern not in SHAREABLE and not r.copy_images and r.questions_per_row not in (None, 1),
            f"model.attention_pattern={pattern} lets the image see its question, so "
            f"data.questions_per_row={r.questions_per_row} questions cannot share one; set "
            "data.questions_per_row=1, or model.attention_pattern=blockwise_prefix",
        ),
    ]
