"""What is frozen and what trains, at a glance, before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmvqa.models.interface import PARTS, Model, num_weights


def banner(model: Model, groups: Sequence[Mapping[str, Any]]) -> str:
    """A table of the parts: parameters, how many train, dtype, learning rate.

    Args:
        groups: the optimizer's parameter groups (`VqaTrainer.parameter_groups`).
    """
    rates = {group["name"]: group["lr"] for group in groups}
    parts = {name: list(model.part(name).parameters) for name in PARTS}
    lines = [f"{'module':<12}{'parameters':>16}{'trained':>16}  {'dtype':<10}{'learning rate':>14}"]
    for name, parameters in [*parts.items(), ("total", list(model.parameters()))]:
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        rate = "" if name == "total" else f"{rates[name]:g}" if name in rates else "-"
        count = sum(num_weights(p) for p in parameters)
        lines.append(f"{name:<12}{count:>16,}{f'{trained:,}' if trained else 'frozen':>16}  {dtypes:<10}{rate:>14}")
    return "\n".join(lines)
