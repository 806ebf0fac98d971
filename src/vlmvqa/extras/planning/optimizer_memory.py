"""Memory of optimizer states and of an optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from vlmvqa.training.optimizer import CLASSES, is_8bit

BLOCK = 256  # elements per scale in 8-bit states, in bitsandbytes and torchao
SMALLEST_8BIT = 4096  # smaller tensors keep fp32 states, in both
OPTIMIZERS = tuple(CLASSES)  # the optimizers that training supports
FOREACH = ("adamw_torch", "sgd")  # without `fused`, PyTorch runs one kernel per operation
BITSANDBYTES = tuple(name for name, (package, *_) in CLASSES.items() if package == "bitsandbytes")
EIGHT_BIT = tuple(name for name in BITSANDBYTES if "8bit" in name)  # its other optimizers have fp32 states


def state_bytes(optimizer: str, numels: Sequence[int], embeddings: Sequence[int] = (), itemsize: int = 4) -> int:
    """Return the bytes of an optimizer's states, including pages that CUDA may move to host memory.

    `numels` are the numbers of elements of each tensor, `embeddings` those of tensors that 8-bit optimizers keep full
    states of, `itemsize` the bytes per element of the parameters.
    """
    if optimizer == "sgd":
        return 0
    full = 2 * (4 if optimizer in BITSANDBYTES else itemsize)  # bytes per element
    if optimizer in EIGHT_BIT:  # two moments of one byte, two fp32 scales per block
        states = sum(2 * n + 8 * ceil(n / BLOCK) if n >= SMALLEST_8BIT else full * n for n in numels)
    elif optimizer == "adamw_torch_8bit":  # the same, and a table of 256 values for each moment
        eight_bit = [n for n in numels if n >= SMALLEST_8BIT and n % BLOCK == 0]
        states = sum(2 * n + 8 * n // BLOCK + 2048 for n in eight_bit) + full * (sum(numels) - sum(eight_bit))
    else:
        states = full * sum(numels)
    return states + (8 if is_8bit(optimizer) else full) * sum(embeddings)


def step_bytes(optimizer: str, groups: Sequence[Sequence[int]], itemsize: int = 4) -> int:
    """Return the temporary bytes of an optimizer's step, given the numbers of elements in its parameter groups."""
    if optimizer in FOREACH:  # denominators (or decayed gradients) of a group at once
        return max((itemsize * sum(group) for group in groups), default=0)
    if optimizer == "adamw_torch_8bit":  # both moments of a tensor in fp32
        return 8 * max((n for group in groups for n in group), default=0)
    return 0
