"""Dense attention for decoders that cap their scores (Gemma 2), which PyTorch's fused attention cannot do.

The same numbers as transformers' eager attention in four passes over the T x K scores instead of seven: both factors
before the cap are in the queries, the factor after it and the mask are one operation. Keys are not repeated for the
heads that share them.

Legend: B rows, T queries, K keys, H heads, G heads of keys and values, D head width.
"""

from __future__ import annotations

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
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention function.

    Args:
        query: float[B, H, T, D].
        key, value: float[B, G, K, D].
        attention_mask: float[B, 1, T, K], added to the scores.

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
    rows, heads, queries, width = query.shape
    groups = key.shape[1]
    each = (rows, groups, heads // groups, queries, -1)  # the heads that share keys, and their queries
    together = (rows, groups, heads // groups * queries, -1)
    capped = torch.tanh((query * (scaling / softcap)).reshape(*together) @ key.mT)
    scores = torch.add(attention_mask[:, :, None], capped.view(*each), alpha=softcap)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, dropout, module.training)
    mixed = weights.view(*together) @ value
    return mixed.view(rows, heads, queries, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(SOFTCAP, softcap_attention)
