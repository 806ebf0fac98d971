"""CPU stand-ins for CUDA operations that save other tensors for the backward pass than their CPU versions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmvqa.models.interface import Model


def use_float32_norms(model: Model) -> None:
    """Compute layer norms in float32, as autocast does on CUDA but not on the CPU."""

    def in_float32(norm: nn.LayerNorm, values: Tensor) -> Tensor:
        weight, bias = norm.weight.float(), norm.bias.float()
        return torch.nn.functional.layer_norm(values.float(), norm.normalized_shape, weight, bias, norm.eps)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(in_float32, module)  # type: ignore[method-assign]


class _FlashAttention(torch.autograd.Function):
    """Attention that saves queries, keys, values, output and one number per query, like FlexAttention's kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values)
        ctx.save_for_backward(query, key, value, out, norm)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, norm = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_query, to_keys, to_values = backward(gradients[0], query, keys, values, out, norm, 0.0, False)
        shape = (key.shape[0], key.shape[1], groups, *key.shape[2:])
        return to_query, to_keys.reshape(shape).sum(2), to_values.reshape(shape).sum(2)


def replace_flex_attention(model: Model) -> None:
    """Replace FlexAttention, which is compiled for CUDA, with `_FlashAttention` without masks."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _FlashAttention.apply(query, key, value).transpose(1, 2).contiguous(), None

    name = "planned_flex"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    language = model.part("language").module
    language.decoder.config._attn_implementation = name
    masks: Callable[..., Any] = lambda *_: dict.fromkeys(("full_attention", "sliding_attention"))  # noqa: E731
    language._masks = masks
