"""Cost of a study's arms before they run: optimizer steps, floating-point operations, and planned GPU memory.

Operations are counted on a sample of the training's own rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from vlmvqa import ranks
from vlmvqa.config.schema import TrainConfig
from vlmvqa.data.example import Example
from vlmvqa.data.tasks import Task, read_tasks
from vlmvqa.data.train_dataset import TrainDataset
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.planning.gpus import GIB
from vlmvqa.extras.planning.memory import build_on_meta
from vlmvqa.extras.planning.published_sizes import known_settings
from vlmvqa.extras.planning.run import PlanConfig, PlanSettings, build_planner, chosen_run
from vlmvqa.extras.planning.time import EFFICIENCY
from vlmvqa.extras.report.text_tables import aligned
from vlmvqa.extras.study.command_line import refuse_arms
from vlmvqa.models import checkpoint
from vlmvqa.models.flops import COUNTED, count, matrix_rate
from vlmvqa.training.initial_model import with_saved_model
from vlmvqa.training.run import row_settings
from vlmvqa.training.small_data import num_epochs

SAMPLE = 64  # rows that are sampled to count operations


@dataclass(frozen=True)
class ArmCost:
    """Cost of one run of an arm.

    Attributes:
        steps: optimizer steps.
        tera_flop: 10^12 operations of the training; None if they cannot be counted (`models/flops.py`).
        memory_gib: per GPU, as launch/plan.py plans it; None if that knows too little about the model.
    """

    steps: int
    tera_flop: float | None
    memory_gib: float | None


def arm_costs(configs: Mapping[str, TrainConfig]) -> dict[str, ArmCost]:
    """Return the cost of a run of each arm; data is read once for the arms that train on the same.

    Raises:
        InputError: arms cannot run on their data; with the reason for each.
    """
    tasks: dict[str, list[Task]] = {}
    costs: dict[str, ArmCost] = {}
    problems: dict[str, str] = {}
    for name, config in configs.items():
        data = repr(config.data)
        try:
            if data not in tasks:
                tasks[data] = read_tasks(config.data, BadRecords("skip"))  # bad records are reported by the runs
            costs[name] = _cost(config if config.init_from is None else with_saved_model(config), tasks[data])
        except InputError as error:
            problems[name] = str(error)
    refuse_arms(problems, len(configs))
    return costs


def with_equal_flops(configs: Mapping[str, TrainConfig], costs: dict[str, ArmCost]) -> dict[str, TrainConfig]:
    """Return the configs with `trainer.max_steps` set so that every arm spends the operations of the first one.

    Updates `costs`.

    Raises:
        InputError: the operations of an arm cannot be counted.
    """
    uncounted = [name for name, cost in costs.items() if not cost.tera_flop]
    if uncounted:
        raise InputError(
            f"study.equal=flops: the operations of {', '.join(uncounted)} cannot be counted; use study.equal=questions"
        )
    total = next(iter(costs.values())).tera_flop or 0.0
    changed = {}
    for name, config in configs.items():
        per_step = (costs[name].tera_flop or 0.0) / costs[name].steps
        steps = max(1, round(total / per_step))
        costs[name] = replace(costs[name], steps=steps, tera_flop=steps * per_step)
        changed[name] = replace(config, trainer={**config.trainer, "max_steps": steps})
    return changed


def table(costs: Mapping[str, ArmCost]) -> str:
    """Return the costs as text."""
    rows = [
        [name, f"{cost.steps:,}", *("-" if one is None else f"{one:.3g}" for one in (cost.tera_flop, cost.memory_gib))]
        for name, cost in costs.items()
    ]
    return aligned([["arm", "steps", "TFLOP", "GiB per GPU"], *rows])


def seconds(config: TrainConfig, tera_flop: float) -> float:
    """Return the time of so many operations at `EFFICIENCY` of this device's fastest matrix product."""
    trainer = config.trainer
    gpu = torch.cuda.is_available() and not trainer.get("use_cpu")
    dtype = torch.bfloat16 if trainer.get("bf16") else torch.float16 if trainer.get("fp16") else torch.float32
    rate = matrix_rate(torch.device("cuda" if gpu else "cpu"), dtype) * ranks.world_size()
    return 1e12 * tera_flop / (rate * EFFICIENCY)


def _cost(config: TrainConfig, tasks: Sequence[Task]) -> ArmCost:
    examples = [example for task in tasks for example in task.train]
    processor = checkpoint.family(config.model.family).compose_processor(config.model, config.data, examples)
    settings = row_settings(config, processor.shares_images)
    repeats = [task.weight for task in tasks for _ in task.train]
    dataset = TrainDataset(examples, processor, settings, BadRecords("skip"), repeats=repeats)
    trainer = config.trainer
    step_rows = (
        trainer["per_device_train_batch_size"] * trainer.get("gradient_accumulation_steps", 1) * ranks.world_size()
    )
    dataset.set_step_rows(step_rows)
    steps = int(trainer.get("max_steps", -1))
    if steps <= 0:
        per_epoch = len(dataset) // step_rows
        epochs = num_epochs(float(trainer.get("num_train_epochs", 3)), config.given, per_epoch, tasks)
        steps = math.ceil(per_epoch * epochs)
    per_row = _operations_per_row(config, dataset)
    tera_flop = None if per_row is None else per_row * step_rows * steps / 1e12
    return ArmCost(steps, tera_flop, _memory(config, examples))


def _operations_per_row(config: TrainConfig, dataset: TrainDataset) -> float | None:
    """Return the mean operations of a row, over rows at equal distances in an epoch."""
    try:
        model = build_on_meta(known_settings(config.model), config.trainable, config.adapt)
    except InputError:  # an architecture whose sizes are unknown without the hub
        return None
    flops = model.flops()
    if flops is None:
        return None
    rows = [dataset[index] for index in range(0, len(dataset.packing), max(1, len(dataset.packing) // SAMPLE))]
    batch = dataset.processor.collate(rows)
    window = getattr(model.part("language").module.config, "sliding_window", None)
    counts = dict(zip(COUNTED, count(batch, window).tolist(), strict=True))
    images = sum(len(document.images) for row in rows for document in row)
    cached = config.data.feature_cache is not None
    return flops.of({**counts, "images": images, "encoded": 0 if cached else images}) / len(rows)


def _memory(config: TrainConfig, examples: Sequence[Example]) -> float | None:
    """Return the planned GiB of each GPU."""
    questions = sum(len(example.questions) for example in examples) / len(examples)
    settings = PlanSettings(gpus=ranks.world_size(), questions_per_image=questions)
    values = {one.name: getattr(config, one.name) for one in fields(TrainConfig)}
    try:
        planner = build_planner(PlanConfig(**values, plan=settings))
        strategy, checkpointing = chosen_run(config, planner)
        return planner.memory(strategy, planner.rows.rows, checkpointing).needed / GIB
    except InputError:
        return None
