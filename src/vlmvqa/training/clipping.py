"""Percentile clipping: the gradient's norm is held to what is usual for this run.

bitsandbytes had it for its optimizers and dropped it in 0.45: the last 100 norms are kept, the newest among them, and
a gradient longer than the one at the given percentile is scaled down to it. There each tensor had its own history,
and the first steps were scaled to zero because the history began as zeros; here there is one, of the global norm, and
it begins empty: until 100 norms are known, the percentile is taken of those that are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vlmvqa.errors import InputError

WINDOW = 100


@dataclass
class Clipping:
    """What the gradient's norm may be at this step.

    Attributes:
        max_norm: never more than this; 0: no such bound.
        percentile: nor more than this percentile of the last 100 norms; None: no such bound.
        norms: those norms, oldest first; a checkpoint keeps them.
    """

    max_norm: float = 0.0
    percentile: int | None = None
    norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.percentile is not None and not 0 < self.percentile <= 100:
            raise InputError(f"clip_percentile={self.percentile} must lie between 1 and 100; null turns it off")

    def limit(self, norm: float) -> float:
        """Take in this step's norm (before clipping); the norm it may have."""
        if math.isfinite(norm):  # under fp16 the scaler steps over the others
            self.norms = [*self.norms, norm][-WINDOW:]
        bounds = [self.max_norm] if self.max_norm > 0 else []
        if self.percentile is not None and self.norms:
            usual = sorted(self.norms)
            bounds.append(usual[min(len(usual) * self.percentile // 100, len(usual) - 1)])
        return min(bounds, default=float("inf"))
