"""Statistics of a merge: how far each model moved from the base, and where models disagree."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor


class MergeStatistics:
    """Sums over the tensors of one part of the model (vision, projector, language).

    Attributes:
        entries: Number of elements.
        base: Sum of squares of the base's weights.
        deltas: Sum of squares of each model's deltas, float64[M].
        moved: Number of each model's nonzero deltas, int64[M].
        kept: Number of these that trimming or dropping kept, int64[M].
        conflicts: Elements that two models move in opposite directions by their kept deltas.
        touched: Elements with a kept delta of any model.
    """

    def __init__(self, models: int) -> None:
        self.entries = self.conflicts = self.touched = 0
        self.base = 0.0
        self.deltas = torch.zeros(models, dtype=torch.float64)
        self.moved, self.kept = torch.zeros(2, models, dtype=torch.int64)

    def add(self, base: Tensor, deltas: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Add a chunk of the base, float[n], with the models' deltas before and after trimming, float[M, n], if any."""
        self.entries += base.numel()
        self.base += float(base.double().square().sum())
        if deltas is None or kept is None:
            return
        self.deltas += deltas.double().square().sum(1)
        self.moved += deltas.count_nonzero(1)
        self.kept += kept.count_nonzero(1)
        up, down = (kept > 0).any(0), (kept < 0).any(0)
        self.conflicts += int((up & down).sum())
        self.touched += int((up | down).sum())

    def record(self) -> dict[str, Any]:
        """Return the norms and shares for `merge.json`."""
        counts = zip(self.kept.tolist(), self.moved.tolist(), strict=True)
        return {
            "entries": self.entries,
            "norm_of_base": sqrt(self.base),
            "norms_of_deltas": self.deltas.sqrt().tolist(),
            "kept": [kept / moved if moved else None for kept, moved in counts],
            "sign_conflicts": self.conflicts / max(1, self.touched),
        }
