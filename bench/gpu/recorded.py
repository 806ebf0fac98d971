"""Compare recorded results of `bench.gpu` with the planner: `bench/recorded/MACHINE/*.json`, copied from `--output`.

A folder holds the files of one machine: `machine.json` names its GPU, and `steps.json` has the optimizer steps. Other
sections and rows without seconds are left out.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu import sizes as gpu_sizes
from bench.gpu import steps as gpu_steps
from bench.gpu.section import Row, Section
from vlmvqa.extras.planning.gpus import Gpu

RECORDED = Path(__file__).parents[1] / "recorded"


class Comparison(NamedTuple):
    """A measured row: seconds of a step, those planned, and the least and most for the planner's range of constants."""

    name: str
    measured: float
    planned: float
    least: float
    most: float
    planned_bytes: int
    measured_bytes: int | None


def compare(folder: Path) -> list[Comparison]:
    """Compare every measured step of one machine's folder."""
    steps = json.loads((folder / "steps.json").read_text())
    section = Section("steps", torch.device("cpu"), gpu_sizes.SIZES[steps["size"]])
    known = {setup.name: setup for setup in gpu_steps.setups(section)}
    rows = [row for row in steps["rows"] if row.get("seconds")]
    gpu = _gpu(folder)
    return [_compare(section, known[row["name"]], row, gpu) for row in rows]


def _gpu(folder: Path) -> Gpu:
    machine = json.loads((folder / "machine.json").read_text())
    found = next(row for row in machine["rows"] if "gpu" in row)
    gpu = gpu_sizes.gpu_named(found["gpu"], found["memory_bytes"])
    if gpu is None:
        raise ValueError(f"{found['gpu']} is not in extras/planning/gpus.py")
    return gpu


def _compare(section: Section, setup: gpu_steps.Setup, row: Row, gpu: Gpu) -> Comparison:
    from vlmvqa.extras.planning.planner import RunChoice
    from vlmvqa.extras.planning.time import SENSITIVE, questions_per_second

    planner = gpu_steps.make_planner(section, row["row_tokens"], row["supervised"])
    planner.gpu = gpu
    planner = planner.vary(training=gpu_steps.training(setup))
    work = planner.work(RunChoice(setup.strategy, setup.rows, setup.recomputed, setup.accumulation))
    planned, *range_ = (
        work.questions / questions_per_second(work, replace(planner.rates, efficiency=efficiency))
        for efficiency in (planner.rates.efficiency, *SENSITIVE["efficiency"])
    )
    size = planner.memory(setup.strategy, setup.rows, setup.recomputed).peak
    return Comparison(setup.name, row["seconds"], planned, min(range_), max(range_), size, row.get("peak_bytes"))
