"""Size of weights in 4 bits, and a stand-in for bitsandbytes' linear layer that works on fake tensors.

`Params4bit` doesn't support fake tensors. The stand-in allocates the same tensors at the same moments: the dequantized
weight exists only during the multiplication, in the forward and again in the backward pass. Based on `MatMul4Bit` of
bitsandbytes 0.50 and its fallback on CUDA, which is used from 1,536 tokens on; with fewer, a fused kernel needs less
memory in the forward pass.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.models.interface import Model

BLOCK, NESTED_BLOCK = 64, 256  # weights per scale, and scales per nested scale
TABLE, NESTED_TABLE = 16 * 4, 256 * 4  # bytes of a layer's code tables for 4-bit weights and 8-bit scales


def quantized_bytes(numel: int, double: bool) -> int:
    """Return the bytes of `numel` weights in 4 bits, with their scales and tables.

    `double`: the scales are quantized too, to one byte each, an fp32 scale per block and one fp32 offset.
    """
    scales = ceil(numel / BLOCK)
    if not double:
        return ceil(numel / 2) + 4 * scales + TABLE
    return ceil(numel / 2) + scales + 4 * ceil(scales / NESTED_BLOCK) + 4 + TABLE + NESTED_TABLE


class QuantizedLinear(nn.Linear):
    """A linear layer `float[..., in] -> float[..., out]` with a weight in 4 bits."""

    def __init__(self, linear: nn.Linear, settings: AdapterSettings) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype: torch.dtype = getattr(torch, settings.compute_dtype)
        self.stored_bytes = quantized_bytes(linear.weight.numel(), settings.double_quantization)
        self.packed = nn.Parameter(torch.empty(ceil(linear.weight.numel() / 2), 1, dtype=torch.uint8), False)
        self.bias = linear.bias

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The dequantized weight, allocated at each access."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype, device=self.packed.device)
        return nn.Parameter(weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply in the compute dtype and return the dtype of the input."""
        values = input.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        out: Tensor = _QuantizedMatmul.apply(values, bias, self)
        return out.to(input.dtype)


class _QuantizedMatmul(torch.autograd.Function):
    """Saves the quantized weight only."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(values, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.layer.weight.to(gradients[0].dtype), None, None


def quantize(model: Model, settings: AdapterSettings) -> None:
    """Replace the layers that `adapters.quantize` quantizes with stand-ins."""
    host = model.adapter_host
    for name in peft_adapters.packable(model):
        parent, _, last = name.rpartition(".")
        linear: Any = host.get_submodule(name)
        setattr(host.get_submodule(parent), last, QuantizedLinear(linear, settings))
