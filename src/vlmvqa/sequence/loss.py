"""Cross-entropy at supervised positions only, so that no other position needs logits.

Gemma 2's output matrix has 256,000 rows: logits for every position of a batch take gigabytes, and most positions
(image, question, padding) have no label.

Legend: B rows, T tokens, S supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmvqa.sequence.rows import IGNORE

CHUNK = 1024  # supervised tokens at a time: 1 GiB of fp32 logits at V = 256,000


def supervised_loss(
    hidden: Tensor,
    labels: Tensor,
    logits: Callable[[Tensor], Tensor],
    chunk: int = CHUNK,
    weights: Tensor | None = None,
    fused: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy in fp32 over supervised positions.

    Args:
        hidden: float[B, T, D], the decoder's last hidden state.
        labels: int64[B, T], the token that each position predicts; -100 for none.
        logits: float[S, D] -> float32[S, V], the output head with its softcap.
        chunk: positions passed to the output head at once. If there are several chunks, their logits are recomputed in
            the backward pass instead of stored.
        weights: float32[B, T], the weight of each position (None: 1).
        fused: (float[S, D], int64[S]) -> float32[S], a kernel that computes the cross-entropies without storing
            logits; replaces `logits` and `chunk`.

    Returns:
        The weighted sum (0, still attached to the graph, if nothing is supervised), and the sum of the weights, its
        divisor for a mean.
    """

    def chunk_loss(states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (F.cross_entropy(logits(states), targets, reduction="none") * weights).sum()

    # Indices are computed once: each boolean index would synchronize with the GPU.
    supervised = (labels.flatten() != IGNORE).nonzero()[:, 0]
    states = rearrange(hidden, "b t d -> (b t) d").index_select(0, supervised)
    targets = labels.flatten().index_select(0, supervised)
    weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
    weight = weights.flatten().index_select(0, supervised)
    if fused is not None and len(targets):
        return (fused(states, targets) * weight).sum(), weight.sum()
    chunks = list(zip(states.split(chunk), targets.split(chunk), weight.split(chunk), strict=True))
    if len(chunks) == 1:
        losses = [chunk_loss(*chunks[0])]
    else:
        losses = [torch.as_tensor(checkpoint(chunk_loss, *one, use_reentrant=False)) for one in chunks]
    return torch.stack(losses).sum(), weight.sum()


def divide_loss(loss: Tensor, weight: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Divide a summed loss by the weight of the global batch, or by its own weight if that is None."""
    divisor = weight if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=loss.device)
    # If nothing is supervised, the loss is 0, not 0 / 0.
    return loss / divisor.where(divisor != 0, 1)
