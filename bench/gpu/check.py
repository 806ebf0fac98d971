"""One check of the CUDA path in eight minutes: correctness, speed, memory.

    PYTHONPATH=src python -m bench.gpu

One process, no network, no files, no installed project: torch, timm, transformers and einops, no hydra. Random weights.
Each section writes a JSON file when it ends. Every section has a share of --budget; one that starts after the sum of
its own and all earlier shares is skipped, and rows that would start after it too. The exit status is 1 if numbers are
wrong or if a section raised an exception; out of memory is a result.

With several GPUs, `torchrun --nproc-per-node N -m bench.gpu` measures what needs them instead.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from bench import tables
from bench.gpu import answers as gpu_answers
from bench.gpu import correctness as gpu_correctness
from bench.gpu import distributed as gpu_distributed
from bench.gpu import flex as gpu_flex
from bench.gpu import ladder as gpu_ladder
from bench.gpu import loss as gpu_loss
from bench.gpu import machine as gpu_machine
from bench.gpu import profile as gpu_profile
from bench.gpu import shard as gpu_shard
from bench.gpu import steps as gpu_steps
from bench.gpu.section import Section
from bench.gpu.sizes import SIZES

# Name, seconds, function.
SECTIONS: list[tuple[str, int, Callable[[Section], None]]] = [
    ("machine", 15, gpu_machine.machine),
    ("correctness", 70, gpu_correctness.correctness),
    ("ladder", 140, gpu_ladder.run_ladder),
    ("steps", 60, gpu_steps.run_steps),
    ("answers", 60, gpu_answers.answers),
    ("profile", 35, gpu_profile.profile_step),
    ("flex", 50, gpu_flex.flex),
    ("loss", 15, gpu_loss.loss),
]
DISTRIBUTED: list[tuple[str, int, Callable[[Section], None]]] = [
    ("bandwidth", 60, gpu_distributed.bandwidth),
    ("recipe_step", 120, gpu_distributed.recipe_step),
    ("fast_step", 180, gpu_distributed.fast_step),
]
HEADERS = ("section", "state", "seconds", "rows", "comparisons", "")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds of all sections (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument("--size", choices=SIZES, default="real" if cuda else "tiny", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections only")
    parser.add_argument("--output", type=Path, default=Path("bench-gpu"), help="folder (default: %(default)s)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, device: torch.device, started: float) -> list[Section]:
    """Run the sections in order; each gets its share of the budget, and what earlier ones left."""
    several = dist.is_initialized()
    table = DISTRIBUTED if several else SECTIONS
    chosen = [one for one in table if not args.only or one[0] in args.only]
    if not chosen:
        raise SystemExit(f"--only {' '.join(args.only)}: no such section; use {', '.join(one[0] for one in table)}")
    scale = args.budget / sum(seconds for _, seconds, _ in chosen)
    found: list[Section] = []
    for name, seconds, function in chosen:
        started += scale * seconds
        section = Section(name, device, SIZES[args.size], started)
        section.agree = gpu_shard.any_rank if several else None
        section.run(function)
        found.append(section)
        if _is_first():
            section.write(args.output)
            print(f"\n{name}: {section.state} in {section.seconds:.1f} s {section.error}", flush=True)
            print("\n".join([gpu_machine.table(section), *section.notes]) if section.rows else "", flush=True)
    return found


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def summary(sections: Sequence[Section]) -> str:
    """Return a table with a row per section."""
    rows = []
    for one in sections:
        measured = sum(not {"skipped", "error"} & row.keys() for row in one.rows)
        passed = sum(found["passed"] for found in one.comparisons)
        counts = (f"{measured} of {len(one.rows)}", f"{passed} of {len(one.comparisons)}")
        rows.append((one.name, one.state, f"{one.seconds:.1f}", *counts, one.error))
    return tables.table(HEADERS, rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    device = torch.device(args.device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        gpu_shard.join(device)
    sections = run(args, device, time.monotonic())
    if _is_first():
        print(f"\n{summary(sections)}\nwritten to {args.output}/")
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(any(section.failed for section in sections))
