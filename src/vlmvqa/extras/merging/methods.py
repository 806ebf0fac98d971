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
    """Return the weighted mean of the models (model soups, Wortsman et al. 2022); `weights` need not sum to 1."""
    return weighted_sum(values, weights) / weights.sum()


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum; of deltas, to be added to the base, in task arithmetic (Ilharco et al. 2023)."""
    return (weights[:, None] * values).sum(0)


def trim(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Set entries below the threshold of their model (float[M]) in magnitude to 0: step 1 of TIES."""
    return torch.where(deltas.abs() >= thresholds[:, None], deltas, 0.0)


def ties(deltas: Tensor, weights: Tensor) -> Tensor:
    """Merge trimmed deltas with TIES (Yadav et al. 2023, algorithm 1); the paper has weights of 1.

    Each entry's sign is that of the larger total magnitude (step 2), its value the weighted mean over the models whose
    entry has this sign (step 3).
    """
    agrees = (deltas.sign() == weighted_sum(deltas, weights).sign()) & (deltas != 0)
    shares = weights[:, None] * agrees
    return (shares * deltas).sum(0) / shares.sum(0).clamp(min=torch.finfo(deltas.dtype).tiny)


def drop_and_rescale(deltas: Tensor, density: float, generators: Iterable[torch.Generator]) -> Tensor:
    """Keep each entry with probability `density` and divide it by `density` (DARE, Yu et al. 2024).

    Each model has a generator of its own, so that its random numbers do not depend on the other models.
    """
    random = torch.stack([torch.rand(deltas.shape[1], generator=one) for one in generators])
    return torch.where(random < density, deltas / density, 0.0)


def slerp_shares(dot: float, norms: tuple[float, float], share: float) -> tuple[float, float]:
    """Return the factors of both tensors in slerp (Shoemake 1985); each tensor is one vector, as in mergekit.

    `dot` and `norms` are over all entries; `share` is the weight of the second tensor, 0 to 1.
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

    `chunks` is called twice; it yields all entries as float32 chunks.
    """

    def histogram(half: Callable[[Tensor], Tensor]) -> Tensor:
        """Count the 16-bit numbers that `half` returns; from each number on, summed over all higher ones."""
        bits = (chunk.abs().flatten().view(torch.int32).long() for chunk in chunks())
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for chunk in bits:
            counts += torch.bincount(half(chunk), minlength=1 << 16)
        return counts.flip(0).cumsum(0).flip(0)

    upper = histogram(lambda bits: bits >> 16)
    if kept >= int(upper[0]):
        return 0.0
    index = int((upper >= kept).nonzero()[-1])
    missing = kept - int(upper[index + 1])  # index + 1 exists: a magnitude's first bit is 0
    lower = histogram(lambda bits: bits[bits >> 16 == index] & 0xFFFF)
    within = int((lower >= missing).nonzero()[-1])
    return float(torch.tensor((index << 16) | within, dtype=torch.int32).view(torch.float32))
