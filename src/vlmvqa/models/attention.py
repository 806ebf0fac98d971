"""Dense attention for decoders that cap their scores (Gemma 2), which PyTorch's fused attention doesn't support.

It equals transformers' eager attention, with four passes over the T x K scores instead of seven: both factors before
the cap are applied to the queries, and the factor after it is applied together with the mask. Keys are not repeated for
the heads that share them, and scores are computed only within the range of keys that a span of queries sees.

Legend: B rows, T queries, K keys, H heads, G groups of heads that share keys and values, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface

from vlmvqa.errors import InputError

SOFTCAP = "softcap"  # the implementation's name in transformers


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
    """Compute attention with capped scores; the signature is transformers'.

    Args:
        query: float[B, H, T, D].
        key, value: float[B, G, K, D].
        attention_mask: float[B, 1, T, K], added to the scores.
        spans: spans of queries, each with the range of keys that it sees (`masks.key_spans`); None: all.

    Returns:
        float[B, T, H, D], and no weights.

    Raises:
        InputError: the layer has no softcap, although its config does.
    """
    if softcap is None:
        raise InputError(
            f"model.language: {type(module).__name__} does not cap its scores, though its config has "
            "attn_logit_softcapping; choose another model"
        )
    query = query * (scaling / softcap)  # both factors before the cap
    found = []
    for queries, keys in spans or [(slice(None), slice(None))]:
        part = query[:, :, queries], key[:, :, keys], value[:, :, keys], attention_mask[:, :, queries, keys]
        found.append(_attend(*part, softcap, dropout if module.training else 0.0))
    attended = found[0] if len(found) == 1 else torch.cat(found, dim=2)
    return rearrange(attended, "b h t d -> b t h d").contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float, dropout: float) -> Tensor:
    """Attend with scaled queries: `float[B, H, T, D]`."""
    groups, length = key.shape[1], query.shape[2]
    # The heads of a group, and their queries, are one axis of one matrix product with the group's keys.
    grouped = rearrange(query, "b (g h) t d -> b g (h t) d", g=groups)
    scores = grouped @ key.mT
    if not torch.is_grad_enabled():  # answers: cap and softmax in fp32, which in training would store larger tensors
        scores = scores.float()
    capped = rearrange(torch.tanh(scores), "b g (h t) k -> b g h t k", t=length)
    scores = torch.add(mask[:, :, None], capped, alpha=softcap)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, dropout)
    found = rearrange(weights, "b g h t k -> b g (h t) k") @ value
    return rearrange(found, "b g (h t) d -> b (g h) t d", t=length)


AttentionInterface.register(SOFTCAP, softcap_attention)
