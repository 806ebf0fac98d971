"""AdamW's two moments as plain fp32 tensors, whichever optimizer keeps them: PyTorch's, or 8-bit ones.

The 8-bit states of bitsandbytes and torchao are codes into a map of 256 values between -1 and 1, scaled by the largest
magnitude of each block. Read and written again they are the same codes, so that a run resumed where it was saved goes
on as if never stopped; under another split the blocks lie elsewhere, and the codes are the nearest ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

KEYS = ("exp_avg", "exp_avg_sq")
BITSANDBYTES = {"exp_avg": "1", "exp_avg_sq": "2"}  # state1, qmap1, absmax1; state2...
PIECE = 2**22
OPTIMIZERS = (  # whose states these are
    *("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_torch_8bit"),
    *("paged_adamw_32bit", "paged_adamw_8bit"),
)


def read(state: dict[str, Any]) -> dict[str, Tensor]:
    """The moments of a parameter (this rank's part of it) in fp32, by `KEYS`; none before the first step, or of SGD."""
    if not {"state1", "exp_avg"} & state.keys():
        return {}
    if "state1" in state:
        found = {key: _dense_bitsandbytes(state, number) for key, number in BITSANDBYTES.items()}
    else:
        found = {key: _local(state[key]) for key in KEYS}
    return {key: _dense_torchao(value) if hasattr(value, "codes") else value.float() for key, value in found.items()}


def step_of(state: dict[str, Any]) -> int:
    """How many steps these moments have seen."""
    return int(state.get("step", 0))


def write(
    optimizer: torch.optim.Optimizer, group: int, parameter: Tensor, moments: dict[str, Tensor], step: int
) -> None:
    """Make the state of a parameter of `optimizer.param_groups[group]`: these moments of its local part, in fp32."""
    state = _fresh(optimizer, group, parameter)
    for key, dense in moments.items():
        if "state1" in state:
            number = BITSANDBYTES[key]
            codes, absmax = state[f"state{number}"], state.get(f"absmax{number}")
            kept, scale, qmap = codes, absmax, state.get(f"qmap{number}")
        else:
            kept = _local(state[key])
            scale, qmap = getattr(kept, "scale", None), getattr(kept, "qmap", None)
            kept = getattr(kept, "codes", kept)
        if scale is None or qmap is None:
            kept.copy_(dense.reshape(kept.shape))
        else:
            codes, absmax = quantize(dense, qmap, kept.numel() if scale.numel() == 1 else 256)
            kept.copy_(codes.reshape(kept.shape))
            scale.copy_(absmax)
    state["step"] = step if isinstance(state["step"], int) else state["step"].fill_(step)


def quantize(values: Tensor, qmap: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes `uint8[n]` and the largest magnitude of each block `float[ceil(n / block)]`.

    The most negative code stands for -0.993, not -1: a block whose largest value is negative has been shortened by that
    when it was read, and is stretched again here, so that its codes come back as they were.
    """
    flat = values.flatten()
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=qmap.device)
    absmax = torch.empty(-(-len(flat) // block), device=qmap.device)
    between = (qmap[1:] + qmap[:-1]) / 2
    for start, end in _pieces(len(flat), block):
        piece = flat[start:end].to(qmap.device, torch.float32)
        blocks = F.pad(piece, (0, -len(piece) % block)).view(-1, block)
        largest = blocks.abs().amax(1)
        if qmap[0] < 0:
            largest = torch.where(blocks.amin(1) == -largest, largest / -qmap[0], largest)
        unit = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes[start:end] = torch.bucketize(unit.flatten()[: len(piece)], between).to(torch.uint8)
        absmax[start // block : start // block + len(largest)] = largest
    return codes, absmax


def dequantize(codes: Tensor, qmap: Tensor, absmax: Tensor, block: int) -> Tensor:
    """What the codes stand for, in fp32 and their shape, in host memory, where there is room for it."""
    flat = codes.flatten()
    values = torch.empty(flat.shape)
    for start, end in _pieces(len(flat), block):
        scale = absmax[start // block : -(-end // block)].repeat_interleave(block)[: end - start]
        values[start:end] = (qmap[flat[start:end].long()] * scale).cpu()
    return values.view(codes.shape)


def _pieces(length: int, block: int) -> Iterator[tuple[int, int]]:
    """Of whole blocks, a few million elements each: what is computed with them is many times as large."""
    size = max(PIECE // block, 1) * block
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _fresh(optimizer: torch.optim.Optimizer, group: int, parameter: Tensor) -> dict[str, Any]:
    """An empty state as the optimizer itself would make it at its first step."""
    settings = optimizer.param_groups[group]
    optimizer.state[parameter] = {}
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        # Under ZeRO-3 a group has its partition only while it steps.
        before, settings["params"] = settings["params"], [parameter]
        optimizer.init_state(settings, parameter, group, 0)
        settings["params"] = before
    elif hasattr(optimizer, "_new_buffer"):  # torchao
        new = optimizer._new_buffer
        moments = {"exp_avg": new(parameter, True), "exp_avg_sq": new(parameter, False)}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    else:
        device = parameter.device if settings.get("fused") or settings.get("capturable") else torch.device("cpu")
        step = torch.zeros((), dtype=torch.float32, device=device)
        optimizer.state[parameter] = {"step": step, **{key: torch.zeros_like(parameter) for key in KEYS}}
    state: dict[str, Any] = optimizer.state[parameter]
    return state


def _dense_bitsandbytes(state: dict[str, Any], number: str) -> Tensor:
    codes: Tensor = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes
    return dequantize(codes, state[f"qmap{number}"], state[f"absmax{number}"], 256)


def _dense_torchao(state: Any) -> Tensor:
    return dequantize(state.codes, state.qmap, state.scale, state.block_size)


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
