"""Shared by all benchmarks: options, description of the machine, Markdown table, JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
import transformers

from bench import clock
from bench.models import MODELS
from bench.shapes import SHAPES
from vlmvqa.sequence.rows import SHAREABLE

Row = dict[str, Any]


def parser(name: str, description: str | None, images: int = 8, repeats: int = 3) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share, with defaults for `images` and `repeats`."""
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", choices=MODELS, default="real" if cuda else "mid", help="default: %(default)s")
    made.add_argument(
        "--shape", choices=SHAPES, default="vqav2", help="dataset whose lengths are used (default: %(default)s)"
    )
    made.add_argument(
        "--attention-pattern", choices=SHAREABLE, default="causal", help="attention pattern (default: %(default)s)"
    )
    made.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    made.add_argument("--images", type=int, default=images, help="number of images (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=repeats, help="the fastest is printed (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("runs/bench") / f"{name}.json", help="default: %(default)s")
    return made


def machine(device: torch.device | str, dtype: torch.dtype) -> Row:
    """Return the machine, the versions, and the machine's peak rates."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_flops_per_second": clock.matrix_rate(device, dtype),
        "bytes_per_second": clock.bandwidth(device),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def describe(found: Row) -> str:
    """Describe the machine in one line."""
    rates = f"{_si(found['matrix_flops_per_second'])}FLOP/s in a matrix product, {_si(found['bytes_per_second'])}B/s"
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "timm", "transformers"))
    device = f"{found['device']}, {found['threads']} threads, {found['dtype']}"
    return f"{device}, {rates} in a copy; {versions}; {found['date']}"


def _si(number: float) -> str:
    for power, prefix in ((12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "


def least_seconds(machine: Row, flops: float, size: float) -> float:
    """Return the floor: the operations at the matrix rate or the bytes at the bandwidth, whichever takes longer."""
    return max(flops / machine["matrix_flops_per_second"], size / machine["bytes_per_second"])


def mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f}"


def times(ratio: float | None) -> str:
    """Format a ratio."""
    return "" if ratio is None else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:,.0f}x"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format an aligned Markdown table: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def write_json(args: argparse.Namespace, machine: Row, rows: Sequence[Row], **more: Any) -> None:
    """Write `{benchmark, arguments, machine, rows, ...}` to `--out`."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    name = Path(args.out).stem
    found = {"benchmark": name, "arguments": arguments, "machine": machine, **more, "rows": list(rows)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {args.out}")
