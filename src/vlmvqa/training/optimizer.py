"""Trainable parameters, and their optimizer: supported names, parameter groups, gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError
from vlmvqa.models.interface import PARTS, Model, Part

# Package, class and install extra of each optimizer.
CLASSES = {
    "adamw_torch": ("torch.optim", "AdamW", None),
    "adamw_torch_fused": ("torch.optim", "AdamW", None),
    "adamw_bnb_8bit": ("bitsandbytes", "AdamW", "8bit"),
    "adamw_torch_8bit": ("torchao", "AdamW8bit", "8bit"),
    "paged_adamw_32bit": ("bitsandbytes", "AdamW", "8bit"),
    "paged_adamw_8bit": ("bitsandbytes", "AdamW", "8bit"),
    "sgd": ("torch.optim", "SGD", None),
}
OPTIMIZERS = tuple(name for name in CLASSES if name != "sgd")  # those that `checkpoint_state.py` saves moments of
NORM_WINDOW = 100  # gradient norms that the clipping percentile is taken of


def set_trainable(part: Part, choice: str | int, name: str) -> None:
    """Set which parameters of a part train.

    Args:
        choice: "all", "none", or an int n for the last n blocks with the final norms.
        name: the part's name, for error messages.

    Raises:
        InputError: unknown choice, or the part has fewer blocks.
    """
    if isinstance(choice, bool) or (choice not in ("all", "none") and not isinstance(choice, int)):
        raise InputError(f"trainable.{name}={choice} is unknown; use all, none, or the number of last blocks")
    for parameter in part.parameters:
        parameter.requires_grad_(choice == "all")
    if isinstance(choice, int):
        if not 0 < choice <= len(part.blocks):
            raise InputError(f"trainable.{name}={choice}: no such number of last blocks there; use all or none")
        for module in (*part.blocks[-choice:], *part.final_norms):
            module.requires_grad_(True)


def optimizer_for(name: str, dist: DistSettings) -> str:
    """Return the optimizer to use for `trainer.optim`.

    bitsandbytes' kernels do not support DTensors, so torchao's 8-bit AdamW of the same blocks replaces it under FSDP2.
    """
    return "adamw_torch_8bit" if dist.strategy == "fsdp" and name == "adamw_bnb_8bit" else name


def parameter_groups(
    model: Model,
    learning_rates: Mapping[str, float | None],
    default_rate: float,
    weight_decay: float,
    decayed: Collection[str],
    fp32_moments: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return the parameter groups of each model part: with and without weight decay, and with moments in fp32.

    Args:
        learning_rates: by part; None or missing: `default_rate`.
        decayed: names of the parameters with weight decay.
        fp32_moments: names of the parameters whose moments an 8-bit optimizer keeps in fp32.

    Returns:
        groups with `params`, `lr`, `weight_decay`, `fp32_moments`, and the part as `name`.

    Raises:
        InputError: no parameter is trained.
    """
    groups = []
    for part in PARTS:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and model.part_of(n) == part]
        rate = learning_rates.get(part)
        lr = default_rate if rate is None else rate
        for fp32, has_decay in product((True, False), repeat=2):
            params = [p for n, p in trained if (n in decayed) == has_decay and (n in fp32_moments) == fp32]
            decay = weight_decay if has_decay else 0.0
            if params:
                groups.append({"params": params, "lr": lr, "weight_decay": decay, "fp32_moments": fp32, "name": part})
    if not groups:
        raise InputError("nothing trains: every part is set to trainable=none; set one to all")
    return groups


def is_8bit(name: str) -> bool:
    """Return whether an optimizer's moments have 8 bits."""
    return "8bit" in name


def embedding_weights(model: nn.Module) -> set[str]:
    """Return the names of the weights of embeddings."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


@dataclass
class GradientClipping:
    """Clip the global gradient norm to a fixed bound and to a percentile of the run's last norms.

    Percentile clipping was an option of bitsandbytes' optimizers until 0.45, which kept the last 100 norms of each
    tensor, the current one included. Here one history of the global norm is kept. It starts empty instead of as zeros,
    which scaled the first steps to zero; until it is full, the percentile is taken of the norms so far.

    Attributes:
        max_norm: upper bound; 0: none.
        percentile: percentile of the last `NORM_WINDOW` norms, 1 to 100; None: no such bound.
        norms: the last norms before clipping, oldest first; saved in checkpoints.
    """

    max_norm: float = 0.0
    percentile: int | None = None
    norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.percentile is not None and not 0 < self.percentile <= 100:
            raise InputError(f"clip_percentile={self.percentile} must lie between 1 and 100; null turns it off")

    def limit(self, norm: float) -> float:
        """Record this step's norm before clipping and return the norm to clip to (infinity: no clipping)."""
        if math.isfinite(norm):  # under fp16 the scaler skips steps with other norms
            self.norms = [*self.norms, norm][-NORM_WINDOW:]
        bounds = [self.max_norm] if self.max_norm > 0 else []
        if self.percentile is not None and self.norms:
            ordered = sorted(self.norms)
            bounds.append(ordered[min(len(ordered) * self.percentile // 100, len(ordered) - 1)])
        return min(bounds, default=float("inf"))
