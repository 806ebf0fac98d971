"""Merging methods, each over the same piece of every model: float32[M, n], M models, n entries.

A delta is a tuned model's entry minus the base's: what tuning did to it (Ilharco et al. 2023 call all of them a task
vector).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Above this cosine two tensors are so nearly parallel that the sine is nought, and slerp a straight line.
PARALLEL = 0.9995


def linear(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the models themselves (model soups, Wortsman et al. 2022).

    Args:
        values: float[M, n], the models' own.
        weights: float[M]; they need not add up to 1.
    """
    return (weights[:, None] * values).sum(0) / weights.sum()


def task_arithmetic(deltas: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the deltas (Ilharco et al. 2023), which is added to the base."""
    return (weights[:, None] * deltas).sum(0)


def trim(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """TIES' first step: entries whose magnitude is below their model's threshold (float[M]) become 0."""
    return torch.where(deltas.abs() >= thresholds[:, None], deltas, 0.0)


def elect(deltas: Tensor, weights: Tensor) -> Tensor:
    """TIES' second step: the sign, float[n], of larger total magnitude at each entry; 0 where both are even."""
    return (weights[:, None] * deltas).sum(0).sign()


def disjoint_mean(deltas: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
    """TIES' third step: the weighted mean of each entry over the models whose entry has the elected sign."""
    agrees = (deltas.sign() == signs) & (deltas != 0)
    shares = weights[:, None] * agrees
    return (shares * deltas).sum(0) / shares.sum(0).clamp(min=torch.finfo(deltas.dtype).tiny)


def ties(deltas: Tensor, weights: Tensor) -> Tensor:
    """TIES-Merging (Yadav et al. 2023, algorithm 1) of trimmed deltas; weights of 1 are the paper's."""
    return disjoint_mean(deltas, weights, elect(deltas, weights))


def drop_and_rescale(deltas: Tensor, density: float, generators: Iterable[torch.Generator]) -> Tensor:
    """DARE (Yu et al. 2024): each entry is kept with probability `density`, and then divided by it.

    Args:
        generators: one a model, so that its draws do not depend on the others.
    """
    drawn = torch.stack([torch.rand(deltas.shape[1], generator=one) for one in generators])
    return torch.where(drawn < density, deltas / density, 0.0)


def slerp_shares(dot: float, norms: tuple[float, float], share: float) -> tuple[float, float]:
    """What slerp multiplies two tensors by (Shoemake 1985; a whole tensor is one vector, as in mergekit).

    Args:
        dot: their product, over all entries.
        norms: of both, over all entries.
        share: of the second, 0 to 1.
    """
    product = norms[0] * norms[1]
    cosine = max(-1.0, min(1.0, dot / product)) if product else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - share, share
    angle = math.acos(cosine)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


def kth_magnitude(pieces: Callable[[], Iterable[Tensor]], kept: int) -> float:
    """The `kept`-th largest magnitude of all entries, exactly, without having them in memory at once.

    The bits of a non-negative float32 order it as the whole number that they spell: a histogram of their upper half
    finds the bin, one of the lower half within it the number.

    Args:
        pieces: gives all entries, float32, a piece at a time; called twice.
        kept: 1 or more.
    """
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for piece in pieces():
        upper += torch.bincount(_bits(piece) >> 16, minlength=1 << 16)
    if kept >= int(upper.sum()):
        return 0.0
    above = upper.flip(0).cumsum(0).flip(0)  # entries in this bin and all larger ones
    place = int((above >= kept).nonzero()[-1])
    missing = kept - (int(above[place]) - int(upper[place]))
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for piece in pieces():
        bits = _bits(piece)
        lower += torch.bincount(bits[bits >> 16 == place] & 0xFFFF, minlength=1 << 16)
    within = int((lower.flip(0).cumsum(0).flip(0) >= missing).nonzero()[-1])
    return float(torch.tensor((place << 16) | within, dtype=torch.int32).view(torch.float32))


def _bits(values: Tensor) -> Tensor:
    return values.abs().flatten().view(torch.int32).long()
