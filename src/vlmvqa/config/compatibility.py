"""Combinations of settings that cannot work: one table of conditions and error messages.

An extra keeps its own rows in a module `compatibility`, which is imported only when a config uses the extra. Training
calls `check` before anything is loaded or written.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vlmvqa.config.schema import AnyModelSettings, DistSettings, TrainConfig
from vlmvqa.errors import InputError, suggest
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.sequence.masks import SHAREABLE
from vlmvqa.training.optimizer import CLASSES, OPTIMIZERS, optimizer_for


@dataclass(frozen=True)
class RunRequest:
    """The settings of a run that can contradict each other or the device.

    Attributes:
        trainer: the `trainer` group.
        questions_per_row, row_tokens: `data.questions_per_row` and `data.row_tokens`.
        cached: whether the encoder's output is cached (`data.feature_cache`).
        trained_vision: `trainable.vision`.
        gpu: whether the run trains on a GPU.
        bf16_works: whether the device computes in bfloat16.
        adapt: the `adapt` group, if there are adapters.
        accelerate_precision: the mixed precision that accelerate's config file sets.
    """

    dist: DistSettings
    trainer: Any
    model: AnyModelSettings
    questions_per_row: int | None = None
    row_tokens: int | None = None
    cached: bool = False
    trained_vision: str = "all"
    gpu: bool = False
    bf16_works: bool = True
    adapt: Any = None
    accelerate_precision: str = "no"

    @property
    def optim(self) -> str:
        """The optimizer that runs."""
        return optimizer_for(self.trainer.get("optim", "adamw_torch"), self.dist)

    @property
    def precision(self) -> str:
        """The mixed precision of the run: bf16, fp16 or no."""
        return "bf16" if self.trainer.get("bf16") else "fp16" if self.trainer.get("fp16") else "no"

    @property
    def own(self) -> ModelSettings | None:
        """The settings of a `VLM`; None for a pretrained model."""
        return self.model if isinstance(self.model, ModelSettings) else None


class Rule(NamedTuple):
    """A combination that cannot work, and the sentence that names the nearest one that does."""

    when: Callable[[RunRequest], Any]
    message: Callable[[RunRequest], str]


def missing(package: str) -> bool:
    """Return whether a package is not installed."""
    return importlib.util.find_spec(package) is None


RULES: Sequence[Rule] = (
    Rule(
        lambda r: r.accelerate_precision not in ("no", r.precision),
        lambda r: (
            f"accelerate's config file sets {r.accelerate_precision}, the run sets {r.precision}; add "
            f"trainer.{r.accelerate_precision}=true"
        ),
    ),
    # ---- optimizers
    Rule(
        lambda r: r.optim not in CLASSES,
        lambda r: (
            f"trainer.optim={r.optim} has no states that every strategy can save; use one of "
            f"{', '.join(OPTIMIZERS)}{suggest(r.optim, OPTIMIZERS)}"
        ),
    ),
    Rule(
        lambda r: CLASSES[r.optim][2] and missing(CLASSES[r.optim][0]),
        lambda r: (
            f"trainer.optim={r.optim} needs {CLASSES[r.optim][0]}; install it with: pip install "
            f"'vlmvqa[{CLASSES[r.optim][2]}]'"
        ),
    ),
    Rule(
        lambda r: r.optim.startswith("paged") and not r.gpu,
        lambda r: (
            f"trainer.optim={r.optim}: paged states need CUDA, so it needs a GPU; use adamw_bnb_8bit or adamw_torch"
        ),
    ),
    Rule(
        lambda r: r.optim.startswith("paged") and r.dist.strategy == "fsdp",
        lambda r: f"trainer.optim={r.optim} cannot step on FSDP2's shards; use adamw_torch_8bit, or dist=fsdp_offload",
    ),
    # ---- strategies
    Rule(
        lambda r: r.dist.is_zero and missing("deepspeed"),
        lambda r: (
            f"dist={r.dist.strategy} needs DeepSpeed; install it with: pip install 'vlmvqa[deepspeed]', or use "
            "dist=fsdp"
        ),
    ),
    Rule(
        lambda r: r.dist.is_zero and r.optim == "adamw_torch_8bit",
        lambda r: f"trainer.optim=adamw_torch_8bit does not step on {r.dist.strategy}'s partitions; use adamw_bnb_8bit",
    ),
    Rule(
        lambda r: (
            r.dist.strategy == "zero3"
            and any(r.trainer.get(f"torch_compile{more}") for more in ("", "_backend", "_mode"))
        ),
        lambda r: (
            "trainer.torch_compile=true: the tied output matrix is not traced under zero3; use dist=fsdp or zero2"
        ),
    ),
    Rule(
        lambda r: r.dist.is_zero and r.trainer.get("use_cpu") and torch.cuda.is_available(),
        lambda r: (
            "trainer.use_cpu=true: DeepSpeed uses a GPU if there is one; hide it with CUDA_VISIBLE_DEVICES=, or "
            f"use dist=ddp instead of {r.dist.strategy}"
        ),
    ),
    # ---- precision
    Rule(
        lambda r: r.trainer.get("fp16") and not r.gpu,
        lambda r: "trainer.fp16=true needs a GPU; use trainer.bf16=true or neither on the CPU",
    ),
    Rule(
        lambda r: r.trainer.get("fp16") and r.dist.strategy == "fsdp",
        lambda r: "trainer.fp16=true does not work under dist=fsdp; use trainer.bf16=true, or dist=zero2 without it",
    ),
    Rule(
        lambda r: r.trainer.get("bf16") and not r.bf16_works,
        lambda r: (
            "trainer.bf16=true: this card does not compute in bfloat16; use trainer.fp16=true under dist=ddp or zero2"
        ),
    ),
    Rule(
        lambda r: r.model.dtype != "float32" and r.dist.is_zero and not r.trainer.get("bf16"),
        lambda r: f"model.dtype={r.model.dtype} under {r.dist.strategy} needs trainer.bf16=true",
    ),
    Rule(
        lambda r: r.model.dtype == "float16" and r.adapt is None,
        lambda r: (
            "model.dtype=float16: weights that train are kept in float32; set model.dtype=float32 (trainer.fp16=true)"
        ),
    ),
    # ---- data and loss
    Rule(
        lambda r: r.cached and r.trained_vision != "none",
        lambda r: (
            f"trainable.vision={r.trained_vision}: an encoder whose output is cached cannot train; set "
            "trainable.vision=none, or leave data.feature_cache out"
        ),
    ),
    Rule(
        lambda r: r.trainer.get("average_tokens_across_devices") is False,
        lambda r: "trainer.average_tokens_across_devices=false would weigh ranks equally, not tokens; leave it out",
    ),
    # ---- our own model
    Rule(
        lambda r: r.own and r.own.language.attention == "flex" and not r.gpu,
        lambda r: (
            "model.language.attention=flex: FlexAttention has no backward pass on the CPU; use "
            "model.language.attention=dense"
        ),
    ),
    Rule(
        lambda r: r.own and r.own.language.loss == "fused" and not r.gpu,
        lambda r: "model.language.loss=fused: its kernel needs a GPU; use model.language.loss=chunked",
    ),
    Rule(
        lambda r: r.own and r.own.language.loss == "fused" and missing("cut_cross_entropy"),
        lambda r: "model.language.loss=fused needs cut-cross-entropy; install it with: pip install 'vlmvqa[fused]'",
    ),
    Rule(
        lambda r: r.own and r.own.attention_pattern not in SHAREABLE and r.questions_per_row not in (None, 1),
        lambda r: (
            f"model.attention_pattern={r.own and r.own.attention_pattern} lets the image see its question, so "
            f"data.questions_per_row={r.questions_per_row} questions cannot share one; set "
            "data.questions_per_row=1, or model.attention_pattern=blockwise_prefix"
        ),
    ),
)
# Rows of the extras: when they apply, and the module that holds them.
EXTRAS: Sequence[tuple[Callable[[RunRequest], bool], str]] = (
    (lambda r: r.trainer.get("report_to") not in (None, "none"), "vlmvqa.extras.loggers.tracking"),
    (lambda r: r.adapt is not None, "vlmvqa.extras.adapters.compatibility"),
    (lambda r: r.own is None, "vlmvqa.extras.pretrained.compatibility"),
)


def check(config: TrainConfig, dist: DistSettings) -> None:
    """Raise if the settings of a run contradict each other or the device.

    Raises:
        InputError: with the nearest combination that works.
    """
    refuse(request(config, dist))


def request(config: TrainConfig, dist: DistSettings) -> RunRequest:
    """Return the settings that `refuse` checks."""
    gpu = torch.cuda.is_available() and not config.trainer.get("use_cpu")
    return RunRequest(
        dist,
        config.trainer,
        config.model,
        config.data.questions_per_row,
        config.data.row_tokens,
        config.data.feature_cache is not None,
        str(config.trainable["vision"]),
        gpu,
        torch.cuda.is_bf16_supported(including_emulation=False) if gpu else True,
        config.adapt,
        os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    )


def refuse(asked: RunRequest) -> None:
    """Raise at the first rule of the table that the request breaks.

    Raises:
        InputError: with the nearest combination that works.
    """
    for sentence in _sentences(asked):
        raise InputError(sentence)


def _sentences(asked: RunRequest) -> Iterator[str]:
    extras = [importlib.import_module(module).RULES for applies, module in EXTRAS if applies(asked)]
    # An extra's message first: it names the setting of the extra, the core's may name a consequence of it.
    yield from (rule.message(asked) for rules in (*extras, RULES) for rule in rules if rule.when(asked))
