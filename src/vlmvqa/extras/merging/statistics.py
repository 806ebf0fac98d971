"""Statistics of a merge: how far each model moved from the base, and where models disagree."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from torch import Tensor


@dataclass
class MergeStatistics:
    """Sums over the tensors of one part of the model (vision, projector, language); lists have one item per model.

    Attributes:
        entries: Number of elements.
        base: Sum of squares of the base's weights.
        deltas: Sums of squares of the deltas.
        moved: Numbers of nonzero deltas.
        kept: Numbers of these that trimming or dropping kept.
        conflicts: Elements that two models move in opposite directions by their kept deltas.
        touched: Elements with a kept delta of any model.
    """

    entries: int = 0
    base: float = 0.0
    deltas: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    conflicts: int = 0
    touched: int = 0

    def add_base(self, base: Tensor, models: int) -> None:
        """Add a chunk of the base, float[n], that no model changes."""
        if not self.deltas:
            self.deltas, self.moved, self.kept = [0.0] * models, [0] * models, [0] * models
        self.entries += base.numel()
        self.base += float(base.double().square().sum())

    def add(self, base: Tensor, deltas: Tensor, kept: Tensor) -> None:
        """Add a chunk of the base, float[n], with the models' deltas before and after trimming, float[M, n]."""
        self.add_base(base, len(deltas))
        for model in range(len(deltas)):
            self.deltas[model] += float(deltas[model].double().square().sum())
            self.moved[model] += int(deltas[model].count_nonzero())
            self.kept[model] += int(kept[model].count_nonzero())
        up, down = (kept > 0).any(0), (kept < 0).any(0)
        self.conflicts += int((up & down).sum())
        self.touched += int((up | down).sum())

    def record(self) -> dict[str, Any]:
        """Return the norms and shares for `merge.json`."""
        return {
            "entries": self.entries,
            "norm_of_base": sqrt(self.base),
            "norms_of_deltas": [sqrt(one) for one in self.deltas],
            "kept": [kept / moved if moved else None for kept, moved in zip(self.kept, self.moved, strict=True)],
            "sign_conflicts": self.conflicts / max(1, self.touched),
        }
