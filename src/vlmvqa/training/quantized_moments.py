"""AdamW's 8-bit moments of bitsandbytes and torchao, read and written as fp32 tensors.

Both libraries store codes into a map of 256 values between -1 and 1, scaled by the largest magnitude of each block.
Reading and writing a state gives the same codes, so a resumed run continues bit for bit. Under another sharding the
blocks start elsewhere, and each moment gets the nearest code. Imported only where such an optimizer runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmvqa.training.checkpoint_state import KEYS, local_tensor

BITSANDBYTES_SUFFIX = {"exp_avg": "1", "exp_avg_sq": "2"}  # state1, qmap1, absmax1; state2...
BLOCK = 256  # elements that share a scale
CHUNK = 2**22  # elements converted at once: the intermediate tensors are several times as large


def keep_fp32_moments(optimizer: Any) -> None:
    """Make an 8-bit optimizer keep the moments of its groups with `fp32_moments` in fp32.

    bitsandbytes' own overrides are by parameter or by a group's index, both of which DeepSpeed changes.
    """
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        get_config = optimizer.get_config

        def config_of(index: int, number: int, group: Mapping[str, Any]) -> dict[str, Any]:
            return {**get_config(index, number, group), **({"optim_bits": 32} if group["fp32_moments"] else {})}

        optimizer.get_config = config_of
    else:  # torchao
        kept = {id(p) for group in optimizer.param_groups if group["fp32_moments"] for p in group["params"]}
        new_buffer = optimizer._new_buffer

        def buffer(parameter: Tensor, signed: bool) -> Any:
            if id(parameter) in kept:
                return torch.zeros_like(parameter, dtype=torch.float32)
            return new_buffer(parameter, signed)

        optimizer._new_buffer = buffer


def read(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a parameter's local moments in fp32, by `KEYS`."""
    if "state1" in state:
        return {key: _read_bitsandbytes(state, suffix) for key, suffix in BITSANDBYTES_SUFFIX.items()}
    return {key: _read_torchao(local_tensor(state[key])) for key in KEYS}


def write(optimizer: Any, group: int, parameter: Tensor, moments: Mapping[str, Tensor], step: int) -> None:
    """Create a parameter's optimizer state from its local fp32 moments (see `checkpoint_state.write_moments`)."""
    state = _create_state(optimizer, group, parameter)
    for key, values in moments.items():
        if "state1" in state:
            suffix = BITSANDBYTES_SUFFIX[key]
            stored, scale, qmap = state[f"state{suffix}"], state.get(f"absmax{suffix}"), state.get(f"qmap{suffix}")
        else:
            stored = local_tensor(state[key])
            scale, qmap = getattr(stored, "scale", None), getattr(stored, "qmap", None)
            stored = getattr(stored, "codes", stored)
        if scale is None or qmap is None:  # a small parameter's fp32 moments
            stored.copy_(values.reshape(stored.shape))
        else:
            codes, absmax = quantize(values, qmap, stored.numel() if scale.numel() == 1 else BLOCK)
            stored.copy_(codes.reshape(stored.shape))
            scale.copy_(absmax)
    state["step"] = step if isinstance(state["step"], int) else state["step"].fill_(step)


def quantize(values: Tensor, qmap: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return codes `uint8[n]` and the largest magnitude of each block, `float[ceil(n / block)]`.

    The most negative code stands for -0.993, not -1, so reading shrinks a block whose largest value is negative.
    Writing scales it up again, which gives the original codes.
    """
    flat = values.flatten()
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=qmap.device)
    absmax = torch.empty(-(-len(flat) // block), device=qmap.device)
    boundaries = (qmap[1:] + qmap[:-1]) / 2
    for start, end in _chunks(len(flat), block):
        chunk = flat[start:end].to(qmap.device, torch.float32)
        blocks = F.pad(chunk, (0, -len(chunk) % block)).view(-1, block)
        largest = blocks.abs().amax(1)
        if qmap[0] < 0:
            largest = torch.where(blocks.amin(1) == -largest, largest / -qmap[0], largest)
        unit = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes[start:end] = torch.bucketize(unit.flatten()[: len(chunk)], boundaries).to(torch.uint8)
        absmax[start // block : start // block + len(largest)] = largest
    return codes, absmax


def dequantize(codes: Tensor, qmap: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Return the fp32 values of codes, in their shape and in host memory, which has room for them."""
    flat = codes.flatten()
    values = torch.empty(flat.shape)
    for start, end in _chunks(len(flat), block):
        scale = absmax[start // block : -(-end // block)].repeat_interleave(block)[: end - start]
        values[start:end] = (qmap[flat[start:end].long()] * scale).cpu()
    return values.view(codes.shape)


def _chunks(length: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of about `CHUNK` elements that end at block boundaries."""
    size = max(CHUNK // block, 1) * block
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _create_state(optimizer: Any, group: int, parameter: Tensor) -> dict[str, Any]:
    """Create an empty state as the optimizer does in its first step."""
    settings = optimizer.param_groups[group]
    optimizer.state[parameter] = {}
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        # Under ZeRO-3 a group contains its partition only during the step.
        before, settings["params"] = settings["params"], [parameter]
        optimizer.init_state(settings, parameter, group, 0)
        settings["params"] = before
    else:  # torchao
        new = optimizer._new_buffer
        moments = {"exp_avg": new(parameter, True), "exp_avg_sq": new(parameter, False)}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    state: dict[str, Any] = optimizer.state[parameter]
    return state


def _read_bitsandbytes(state: Mapping[str, Any], suffix: str) -> Tensor:
    stored: Tensor = state[f"state{suffix}"]
    if stored.dtype != torch.uint8:
        return stored.float()
    return dequantize(stored, state[f"qmap{suffix}"], state[f"absmax{suffix}"], BLOCK)


def _read_torchao(stored: Any) -> Tensor:
    if hasattr(stored, "codes"):  # OptimState8bit
        return dequantize(stored.codes, stored.qmap, stored.scale, stored.block_size)
    values: Tensor = stored.float()
    return values
