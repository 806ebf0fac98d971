"""Memory and speed of common GPUs, from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from vlmvqa.errors import InputError, suggest

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: Product name.
        memory: GiB available to PyTorch (`torch.cuda.get_device_properties(0).total_memory`), below the nominal size.
        half: Dense fp16 or bf16 tensor-core rate in TFLOP/s.
        single: fp32 rate in TFLOP/s without TF32, PyTorch's default.
        link: Assumed bandwidth of collectives between GPUs of one machine, GB/s per direction.
        bandwidth: Of its memory, GB/s.
        host: Assumed bandwidth to and from host memory, GB/s per direction.
        bf16: Whether it supports bfloat16.
    """

    name: str
    memory: float
    half: float
    single: float
    link: float
    bandwidth: float
    host: float
    bf16: bool = True


# Memory: the lowest "total capacity" in PyTorch's out-of-memory messages in public issues. Rates, bandwidths of
# memory (A100 of 80 GB: PCIe card): NVIDIA's data sheets, without sparsity; the A10G's rates from AWS. Links: a third
# of PCIe's nominal rate, two thirds of NVLink's; rough, not measured.
GPUS = {
    "t4": Gpu("T4 (16 GB)", 14.56, 65, 8.1, 5, 320, 10, bf16=False),
    "v100_16": Gpu("V100 (16 GB)", 15.75, 125, 15.7, 100, 900, 10, bf16=False),
    "a4000": Gpu("RTX A4000 (16 GB)", 15.61, 76.7, 19.2, 10, 448, 20),
    "a10g": Gpu("A10G (24 GB)", 22.03, 70, 31.2, 10, 600, 12),
    "l4": Gpu("L4 (24 GB)", 22.03, 121, 30.3, 10, 300, 20),
    "a100_40": Gpu("A100 (40 GB)", 39.38, 312, 19.5, 200, 1555, 20),
    "a100_80": Gpu("A100 (80 GB)", 79.14, 312, 19.5, 200, 1935, 20),
    "h100": Gpu("H100 (80 GB)", 79.10, 989, 67, 300, 3350, 40),
    "h200": Gpu("H200 (141 GB)", 139.72, 989, 67, 300, 4800, 40),
}


def gpu(name: str) -> Gpu:
    """Return a GPU by its name in `GPUS`; case, "-" and "_" don't matter (A100-80, a100_80)."""
    key = name.lower().replace("-", "_").replace(" ", "_")
    if key not in GPUS:
        raise InputError(f"plan.gpu={name} is unknown; use one of {', '.join(GPUS)}{suggest(key, GPUS)}")
    return GPUS[key]
