"""Tile sizes of FlexAttention's kernels: the largest that fit a GPU's shared memory.

Inductor's default tiles don't fit every GPU: at Gemma 2's head width of 256, the forward kernel needs 151,552 bytes and
the backward kernel 114,688, but an A10G or an RTX 4090 has 101,376 per block (pytorch#180278, #198224).

Each kernel holds a tile of `resident` tokens and, in a loop, reads tiles of `streamed` tokens (inductor's templates in
torch/_inductor/kernel/flex):

    kernel              resident    streamed                            scores      accumulators
    forward             queries     keys, values                        1           output
    backward, part 1    keys,       queries, output gradients,          2           gradients of keys and values
                        values      log-sum-exp, delta
    backward, part 2    queries,    keys, values                        2           gradient of queries
                        output gradients

Part 2 of the backward kernel needs no more than part 1. The arithmetic was compared with what Triton 3.9 allocates when
it compiles torch 2.15's kernels, with our mask and a softcap, for sm_80, 86, 90 and 120 (which needs no GPU): with
`SCRATCH_BYTES` added, the formulas are upper bounds. Not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmvqa.errors import InputError

# Per token: the mask reads the four columns of `masks.Tokens`. They are int32 now; the comparison was with int64.
MASK_BYTES = 4 * 8
STATISTICS_BYTES = 2 * 4  # per query: log-sum-exp and delta, float32
# By bytes per element: for reductions and changes of layout. Triton 3.9 takes at most 3,072 bytes more than the
# formulas below in bfloat16, and 14,208 in float32 (TF32).
SCRATCH_BYTES = {2: 4096, 4: 16_384}
LARGE = 64  # resident tokens from which on the instructions, and with them the memory, depend on the GPU
LARGE_ON = (8, 9, 12)  # first numbers of the compute capabilities for which large tiles were compared
REGISTERS = 64  # most float32 accumulators of a thread in each output tile, as in inductor's forward tiles on sm_80


@dataclass(frozen=True)
class Tile:
    """Tokens in the resident and in a streamed tile, stages of the software pipeline, and warps."""

    resident: int
    streamed: int
    stages: int
    warps: int = 4


# In order of preference. Both numbers of tokens divide the mask's blocks of 128, and the backward kernel requires that
# `streamed` divides `resident`. Tiles of 32 x 64 and 32 x 32 tokens with 2 stages are what inductor has, or what was
# proposed, for GPUs of sm_120, which also have 101,376 bytes (pytorch#198228).
FORWARD = (
    *(Tile(128, 64, 3, warps=8), Tile(64, 64, 3), Tile(32, 64, 3)),
    *(Tile(32, 64, 2), Tile(32, 32, 2), Tile(16, 16, 2)),
)
BACKWARD = (Tile(128, 64, 3, warps=8), Tile(64, 64, 2, warps=8), Tile(32, 32, 2), Tile(16, 16, 2))


def forward_bytes(tile: Tile, head_dim: int, itemsize: int, major: int = 8, mask_bytes: int = MASK_BYTES) -> int:
    """Return the shared memory per block of the forward kernel, in bytes.

    The sum of the resident queries, the streamed tiles, and a tile of probabilities. A pipeline of s > 1 stages holds
    s - 1 tiles of keys, of values and of the mask's columns; without a pipeline (s = 1) keys and values share one tile.
    Kernels pad the head width to a power of two. On Hopper (sm_90), 64 and more resident tokens are multiplied
    asynchronously (wgmma): s tiles of keys and of values are held, and no probabilities.

    With a mask that reads no tensor (`mask_bytes=0`), 32 x 64 tokens in bfloat16 with 3 stages at head width 256 are
    16,384 + 2 * 2 * 32,768 + 4,096 = 151,552 bytes.

    Args:
        head_dim: width of queries, keys and values.
        itemsize: bytes per element of queries, keys and values.
        major: the first number of the GPU's compute capability.
        mask_bytes: bytes per token that the mask reads.
    """
    return _bytes(tile, 1, head_dim, itemsize, major, mask_bytes)


def backward_bytes(tile: Tile, head_dim: int, itemsize: int, major: int = 8, mask_bytes: int = MASK_BYTES) -> int:
    """Return the shared memory per block of the backward kernel, in bytes; arguments as in `forward_bytes`.

    The sum of two resident tiles, the streamed tiles as in the forward pass, and two tiles of scores (probabilities and
    their gradients). 64 x 64 tokens in bfloat16 with 1 stage at head width 256 are
    2 * 32,768 + 32,768 + 2 * 8,192 = 114,688 bytes, as reported in pytorch#198224. With 1 stage, smaller tiles take up
    to 12,288 bytes more; none of `BACKWARD` has 1 stage.
    """
    return _bytes(tile, 2, head_dim, itemsize, major, mask_bytes + STATISTICS_BYTES)


def kernel_options(head_dim: int, states: torch.Tensor) -> dict[str, Any]:
    """Return FlexAttention's `kernel_options` for hidden states on a GPU.

    Raises:
        InputError: no tile fits.
    """
    device = states.device
    computed_in = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else states.dtype
    gpu = torch.cuda.get_device_properties(device)
    return choose(head_dim, computed_in, gpu.shared_memory_per_block_optin, gpu.major)


def choose(head_dim: int, dtype: torch.dtype, available: int, major: int) -> dict[str, Any]:
    """Return the `kernel_options` with the first tiles that fit, and the kernel that they are for.

    Without `FORCE_USE_FLEX_ATTENTION` inductor takes its decoding kernel for rows shorter than 128 tokens.
    (`BACKEND="TRITON"` is the option's new name; torch 2.15 takes either, not both.)

    Args:
        head_dim: width of queries, keys and values.
        dtype: of queries, keys and values.
        available: shared memory per block (with opt-in), in bytes.
        major: the first number of the GPU's compute capability.

    Raises:
        InputError: no tile fits.
    """
    width = _padded(head_dim)
    fitting: list[Tile] = []
    for tiles, count in ((FORWARD, forward_bytes), (BACKWARD, backward_bytes)):
        sizes = {tile: count(tile, head_dim, dtype.itemsize, major) + SCRATCH_BYTES[dtype.itemsize] for tile in tiles}
        fits = [
            tile
            for tile, size in sizes.items()
            if size <= available
            and tile.resident * width <= 32 * tile.warps * REGISTERS
            and (tile.resident < LARGE or major in LARGE_ON)
        ]
        if not fits:
            raise InputError(
                f"model.language.attention=flex needs {min(sizes.values()):,} bytes of shared memory for heads of "
                f"width {head_dim} in {str(dtype).removeprefix('torch.')}, but this GPU has {available:,}; use "
                "model.language.attention=dense"
            )
        fitting.append(fits[0])
    forward, backward = fitting
    return {
        "FORCE_USE_FLEX_ATTENTION": True,
        "fwd_BLOCK_M": forward.resident,
        "fwd_BLOCK_N": forward.streamed,
        "fwd_num_stages": forward.stages,
        "fwd_num_warps": forward.warps,
        "bwd_BLOCK_M1": backward.streamed,
        "bwd_BLOCK_N1": backward.resident,
        "bwd_BLOCK_M2": backward.resident,
        "bwd_BLOCK_N2": backward.streamed,
        "bwd_num_stages": backward.stages,
        "bwd_num_warps": backward.warps,
    }


def _padded(head_dim: int) -> int:
    """Return the power of two to which kernels pad the head width."""
    return 1 << (head_dim - 1).bit_length()


def _bytes(tile: Tile, residents: int, head_dim: int, itemsize: int, major: int, columns: int) -> int:
    token = _padded(head_dim) * itemsize
    resident, scores = residents * tile.resident * token, residents * tile.resident * tile.streamed * itemsize
    if major == 9 and tile.resident >= LARGE:
        return resident + tile.streamed * (tile.stages * 2 * token + (tile.stages - 1) * columns)
    if tile.stages == 1:
        return resident + tile.streamed * token + scores
    return resident + tile.streamed * (tile.stages - 1) * (2 * token + columns) + scores
