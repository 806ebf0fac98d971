"""Versions, matrix rate, copy rate and launch latency; and FLOP/s as a share of the machine's."""

from __future__ import annotations

import importlib.metadata
import time

import torch

from bench import clock, tables
from bench.gpu import sizes as gpu_sizes
from bench.gpu.section import Row, Section, timed
from vlmvqa.models import flops

LAUNCHES = 2000


def machine(section: Section) -> None:
    """Measure the machine."""
    section.row("versions", versions, section)
    section.row("matrix rate", matrix_rates, section)
    section.row("copy rate", lambda: {"bytes_per_second": clock.bandwidth(section.device)})
    section.row("launch latency", launch_latency, section)
    if not section.cuda:
        section.needs_cuda("shared memory, data sheet's rate")


def versions(section: Section) -> Row:
    names = ("torch", "triton", "transformers", "timm", "accelerate", "einops", "peft")
    found: Row = {name: _version(name) for name in names}
    if section.cuda:
        properties = torch.cuda.get_device_properties(section.device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "shared_memory_per_block": properties.shared_memory_per_block_optin,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def matrix_rates(section: Section) -> Row:
    found: Row = {"flops_per_second": clock.matrix_rate(section.device, section.sizes.half)}
    if (gpu := gpu_sizes.known_gpu(section.device)) is not None:
        found |= {"data_sheet": gpu.name, "of_data_sheet": found["flops_per_second"] / (gpu.half * 1e12)}
    return found


def launch_latency(section: Section) -> Row:
    """Return the seconds per call of a kernel that does nearly nothing: until the GPU is done, and on the host."""
    number = torch.zeros(1, device=section.device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            number.add_(1)

    (seconds,) = timed(section.device, launch, 1)
    started = time.perf_counter()
    launch()
    return {"seconds": seconds / LAUNCHES, "host_seconds": (time.perf_counter() - started) / LAUNCHES}


def utilisation(section: Section, operations: float, seconds: float) -> Row:
    """Return the reached FLOP/s as shares of the measured matrix rate and of the data sheet's rate."""
    rate = operations / seconds
    found: Row = {"of_matrix_rate": rate / flops.matrix_rate(section.device, section.sizes.half)}
    if (gpu := gpu_sizes.known_gpu(section.device)) is not None:
        found["of_data_sheet"] = rate / (gpu.half * 1e12)
    return found


def table(section: Section) -> str:
    """Return a section's rows as a table: a column per figure, without lists and long texts."""
    columns = ["name"]
    for row in section.rows:
        columns += [key for key, value in row.items() if key not in columns and _is_short(value)]
    return tables.table(
        columns, [[row["name"], *(_cell(row.get(column, "")) for column in columns[1:])] for row in section.rows]
    )


def _is_short(value: object) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 40)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value) if _is_short(value) else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
