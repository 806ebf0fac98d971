"""Dense attention for decoders that cap their scores (Gemma 2), which PyTorch's fused attention cannot do.

The same numbers as transformers' eager attention in four passes over the T x K scores instead of seven: both factors
before the cap are in the queries, the factor after it and the mask are one operation. Keys are not repeated for the
heads that share them, and no scores are computed of keys before or after all that a span of queries may see.

Legend: B rows, T queries, K keys, H heads, G heads of keys and values, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from vlmvqa.errors import InputError

SOFTCAP = "softcap"  # its name in transformers


def softcap_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    spans: Sequence[tuple[slice, slice]] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention function.

    Args:
        query: float[B, H, T, D].
        key, value: float[B, G, K, D].
        attention_mask: float[B, 1, T, K], added to the scores.
        spans: each span of queries with the keys that it may see (`sequence/masks.py`); None: one of all.

    Returns:
        float[B, T, H, D], and no weights.

    Raises:
        InputError: the layer has no cap, though its config does.
    """
    if softcap is None:
        raise InputError(
            f"model.language: {type(module).__name__} does not cap its scores, though its config has "
            "attn_logit_softcapping; choose another model"
        )
    # Both factors before the cap. Then a span at a time: fewer scores, and the rest of them are hidden anyway.
    query, found = query * (scaling / softcap), []
    for queries, keys in spans or [(slice(None), slice(None))]:
        part = query[:, :, queries], key[:, :, keys], value[:, :, keys], attention_mask[:, :, queries, keys]
        found.append(_attend(*part, softcap, dropout if module.training else 0.0))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float, dropout: float) -> Tensor:
    """`float[B, H, T, D]`, of queries that are scaled."""
    rows, heads, queries, width = query.shape
    groups = key.shape[1]
    each = (rows, groups, heads // groups, queries, -1)  # the heads that share keys, and their queries
    together = (rows, groups, heads // groups * queries, -1)
    capped = torch.tanh(query.reshape(*together) @ key.mT)
    scores = torch.add(mask[:, :, None], capped.view(*each), alpha=softcap)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, dropout)
    return (weights.view(*together) @ value).view(rows, heads, queries, width)


AttentionInterface.register(SOFTCAP, softcap_attention)
