"""The loss of supervised positions only: no logits where nothing is predicted.

Gemma 2's output matrix has 256,000 rows: logits for every position of a batch are gigabytes, and most
positions (image, question, padding) carry no label.

Legend: B rows, T tokens, S supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
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
    """Summed cross-entropy in fp32 over supervised positions, and what to divide it by for a mean.

    Args:
        hidden: float[B, T, D], the decoder's last hidden state.
        labels: int64[B, T], the token each position predicts, -100 where none.
        logits: float[S, D] -> float32[S, V], the output head with its softcap.
        chunk: how many positions meet the output head at once; each chunk's logits are recomputed in the
            backward pass instead of kept, where there is more than one.
        weights: float32[B, T], what each position counts (None: all the same).
        fused: (float[S, D], int64[S]) -> float32[S], the cross-entropies by a kernel that holds no logits, in place
            of `logits` and chunks.

    Returns:
        the sum, each term times its weight (0, still attached to the graph, where nothing is supervised), and the sum
        of the weights (S without any).
    """

    def chunk_loss(states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (F.cross_entropy(logits(states), targets, reduction="none") * weights).sum()

    supervised = labels != IGNORE
    states, targets = hidden[supervised], labels[supervised]
    counted = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights[supervised]
    if fused is not None and len(targets):
        return (fused(states, targets) * counted).sum(), counted.sum()
    pieces = list(zip(states.split(chunk), targets.split(chunk), counted.split(chunk), strict=True))
    if len(pieces) == 1:
        losses = [chunk_loss(*pieces[0])]
    else:
        losses = [torch.as_tensor(checkpoint(chunk_loss, *piece, use_reentrant=False)) for piece in pieces]
    return torch.stack(losses).sum(), counted.sum()


def divided(loss: Tensor, weight: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """A sum of losses over what the whole global batch weighs, or over its own weight where that is not given."""
    divisor = weight if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=loss.device)
    # Where nothing is supervised the loss is 0, not 0 / 0.
    return loss / divisor.where(divisor != 0, 1)
