"""Weights in 4 bits: what they take, and what is counted in place of bitsandbytes' layer.

`Params4bit` cannot be made of fake tensors, so a layer that makes the same tensors at the same moments stands in for
it: the weight is whole only while it is multiplied with, in the forward pass and again in the backward pass. Written
from bitsandbytes 0.50's `MatMul4Bit` and its fallback on CUDA, which takes over at 1,536 tokens: below, a fused kernel
holds less in the forward pass.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.pretrained.model import PretrainedVLM
from vlmvqa.models.vlm import VLM

BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share one
TABLE, NESTED_TABLE = 16 * 4, 256 * 4  # bytes: the values that 4 bits, and a scale's 8, stand for; each layer has both


def packed_bytes(numel: int, double: bool) -> int:
    """Bytes of a weight in 4 bits, scales and tables included.

    Args:
        double: whether the scales are quantised too: a byte each, with an fp32 scale a block and one fp32 offset.
    """
    scales = ceil(numel / BLOCK)
    if not double:
        return ceil(numel / 2) + 4 * scales + TABLE
    return ceil(numel / 2) + scales + 4 * ceil(scales / NESTED_BLOCK) + 4 + TABLE + NESTED_TABLE


class FourBit(nn.Linear):
    """A linear layer `float[..., in] -> float[..., out]` whose weight is packed."""

    def __init__(self, linear: nn.Linear, settings: AdapterSettings) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype: torch.dtype = getattr(torch, settings.compute_dtype)
        self.stored = packed_bytes(linear.weight.numel(), settings.double_quantization)
        self.packed = nn.Parameter(torch.empty(ceil(linear.weight.numel() / 2), 1, dtype=torch.uint8), False)
        self.bias = linear.bias

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """Unpacked anew whenever it is asked for."""
        whole = torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype, device=self.packed.device)
        return nn.Parameter(whole, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        values = input.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        out: Tensor = _Multiplied.apply(values, bias, self)
        return out.to(input.dtype)


class _Multiplied(torch.autograd.Function):
    """Keeps the packed weight alone."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, layer: FourBit) -> Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(values, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.layer.weight.to(gradients[0].dtype), None, None


def pack(model: VLM | PretrainedVLM, settings: AdapterSettings) -> None:
    """Let stand-ins take the place of the layers that `adapters.quantize` keeps in 4 bits."""
    host = model.net if isinstance(model, PretrainedVLM) else model
    for name in peft_adapters.packable(model):
        parent, _, last = name.rpartition(".")
        linear: Any = host.get_submodule(name)
        setattr(host.get_submodule(parent), last, FourBit(linear, settings))
