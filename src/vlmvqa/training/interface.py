"""The part of `VqaTrainer` that checkpoints and runtime checks use, so that they don't import the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainingArguments

from vlmvqa.config.schema import DistSettings
from vlmvqa.models.interface import Model
from vlmvqa.training.full_state import FullState
from vlmvqa.training.optimizer import GradientClipping


class TrainerInterface(Protocol):
    """A trainer whose model and optimizer are built, wrapped and ready for a step.

    Attributes:
        vlm: the model without wrappers; `model_wrapped` is DDP's module or the DeepSpeed engine.
        dtype: the dtype that the weights were built in.
        saved_dtypes: dtype by name of the weights that a checkpoint contains.
        base_fingerprint: fingerprint of the base model that adapters are trained on; None without adapters.
        describe: writes config.json and the tokenizer into a checkpoint's folder.
    """

    vlm: Model
    args: TrainingArguments
    dist: DistSettings
    dtype: torch.dtype
    full_state: FullState
    clipping: GradientClipping
    saved_dtypes: Mapping[str, torch.dtype]
    base_fingerprint: str | None
    describe: Callable[[Path], None] | None
    # transformers.Trainer's own attributes and methods, which it types loosely or not at all.
    accelerator: Any
    model_wrapped: Any
    lr_scheduler: Any
    state: Any
    control: Any

    @property
    def global_batch(self) -> int:
        """Number of rows per optimizer step, over all ranks."""

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine that wraps the model."""

    def plain_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer without wrappers."""

    def _save_rng_state(self, output_dir: str) -> None: ...
    def _save_scaler(self, output_dir: str) -> None: ...
    def _load_scaler(self, checkpoint: str) -> None: ...
