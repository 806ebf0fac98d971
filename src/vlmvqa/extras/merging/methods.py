"""Merge methods on the same chunk of every model: float32[M, n], M models, n entries.

A delta is a fine-tuned model's weights minus the base's (the "task vector" of Ilharco et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Above this cosine the angle's sine is close to 0, and slerp falls back to linear interpolation.
PARALLEL = 0.9995


def linear(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of the models (model soups, Wortsman et al. 2022).

    Args:
        values: Weights of the models, float[M, n].
        weights: float[M]; they need not sum to 1.
    """
    return (weights[:, None] * values).sum(0) / weights.sum()


def task_arithmetic(deltas: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the deltas (Ilharco et al. 2023), to be added to the base."""
    return (weights[:, None] * deltas).sum(0)


def trim(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Set entries below the threshold of their model (float[M]) in magnitude to 0: step 1 of TIES."""
    return torch.where(deltas.abs() >= thresholds[:, None], deltas, 0.0)


def elect(deltas: Tensor, weights: Tensor) -> Tensor:
    """Return the sign with the larger total magnitude at each entry, float[n]; 0 if equal: step 2 of TIES."""
    return (weights[:, None] * deltas).sum(0).sign()


def disjoint_mean(deltas: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
    """Return the weighted mean over the models whose entry has the elected sign: step 3 of TIES."""
    agrees = (deltas.sign() == signs) & (deltas != 0)
    shares = weights[:, None] * agrees
    return (shares * deltas).sum(0) / shares.sum(0).clamp(min=torch.finfo(deltas.dtype).tiny)


def ties(deltas: Tensor, weights: Tensor) -> Tensor:
    """Merge trimmed deltas with TIES (Yadav et al. 2023, algorithm 1); the paper has weights of 1."""
    return disjoint_mean(deltas, weights, elect(deltas, weights))


def drop_and_rescale(deltas: Tensor, density: float, generators: Iterable[torch.Generator]) -> Tensor:
    """Keep each entry with probability `density` and divide it by `density` (DARE, Yu et al. 2024).

    Args:
        deltas: float[M, n].
        density: Share of entries to keep.
        generators: One per model, so that a model's random numbers do not depend on the other models.
    """
    random = torch.stack([torch.rand(deltas.shape[1], generator=one) for one in generators])
    return torch.where(random < density, deltas / density, 0.0)


def slerp_shares(dot: float, norms: tuple[float, float], share: float) -> tuple[float, float]:
    """Return the factors of both tensors in slerp (Shoemake 1985); each tensor is one vector, as in mergekit.

    Args:
        dot: Dot product over all entries.
        norms: Norms over all entries.
        share: Weight of the second tensor, 0 to 1.
    """
    product = norms[0] * norms[1]
    cosine = max(-1.0, min(1.0, dot / product)) if product else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - share, share
    angle = math.acos(cosine)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


def kth_magnitude(chunks: Callable[[], Iterable[Tensor]], kept: int) -> float:
    """Return the `kept`-th largest magnitude, exactly, without loading all entries at once.

    The bit pattern of a non-negative float32, read as an integer, has the same order: a histogram of the upper 16 bits
    finds the bin, and a histogram of the lower 16 bits within that bin finds the value.

    Args:
        chunks: Yields all entries as float32 chunks; called twice.
        kept: 1 or more.
    """
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in chunks():
        upper += torch.bincount(_float_bits(chunk) >> 16, minlength=1 << 16)
    if kept >= int(upper.sum()):
        return 0.0
    above = upper.flip(0).cumsum(0).flip(0)  # entries in this bin and all higher bins
    index = int((above >= kept).nonzero()[-1])
    missing = kept - (int(above[index]) - int(upper[index]))
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in chunks():
        bits = _float_bits(chunk)
        lower += torch.bincount(bits[bits >> 16 == index] & 0xFFFF, minlength=1 << 16)
    within = int((lower.flip(0).cumsum(0).flip(0) >= missing).nonzero()[-1])
    return float(torch.tensor((index << 16) | within, dtype=torch.int32).view(torch.float32))


def _float_bits(values: Tensor) -> Tensor:
    return values.abs().flatten().view(torch.int32).long()
