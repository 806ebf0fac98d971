"""A plan as text: tables of all strategies, what to set and why; the same as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from vlmvqa.errors import counted
from vlmvqa.extras.planning.gpus import GIB
from vlmvqa.extras.planning.planner import CONTEXT, FRAGMENTATION, Plan, Planner

SIZES = ("parameters", "gradients", "optimizer", "buffers", "activations", "logits", "temporary")
HEADINGS = ("strategy", "needed", "fits", "host", "questions/s", "most rows", "with checkpointing", "worst moment")
LEGEND = f"""\
GiB on each GPU. needed: the worst moment, with {FRAGMENTATION:.0%} (fragments) and {CONTEXT / GIB:.1f} GiB (CUDA)
more. host: GiB of host memory, all GPUs together. questions/s: an estimate from what is assumed
above. most rows: that fit a GPU, without and with activation checkpointing. worst moment: backward
pass, last reduction of gradients, or optimizer's step.
optimizer: its states, and under ZeRO the fp32 weights. buffers: for communication, and weights
gathered from shards. activations: alive when the decoder has returned, under ddp with autocast's
copies of the weights. logits: what the loss adds, with the output matrix's gradient. temporary: the
rest of the worst moment, whose parts are not always all of these columns.
Counted on the real model without weights and from the strategies' code, not measured: verify=true
measures one process on a GPU. Neither torch_compile nor what evaluation needs is planned."""


def headline(planner: Planner, checkpointing: bool) -> str:
    """What is planned, and what is assumed of it."""
    rows, shape, training, gpu = planner.rows, planner.shape, planner.training, planner.gpu
    count = sum(weight.numel for weight in planner.weights)
    learnt = sum(weight.numel for weight in planner.weights if weight.trained)
    rate = gpu.half if training.mixed else gpu.single
    batch = f"{counted(rows.rows, 'row')} a GPU x {training.accumulation} accumulated"
    images = f"{planner.images_per_row} x {planner.image_tokens}"
    questions = f"{rows.most_questions} x {rows.text_tokens}"
    speed = f"{planner.utilisation:.0%} of {rate:g} TFLOP/s, {gpu.link:g} GB/s between GPUs"
    packed = sum(weight.numel for weight in planner.weights if weight.packed)
    return f"""\
model      {count:,} parameters, {learnt:,} of them trained{f", {packed:,} in 4 bits" if packed else ""}
training   {training.precision}, {training.optimizer}, activation checkpointing {"on" if checkpointing else "off"}
batch      {batch}
rows       {shape.tokens} tokens: {images} of images, {questions} of questions; {shape.supervised} are supervised
GPUs       {planner.gpus} x {gpu.name}, {gpu.memory} GiB each for PyTorch
assumed    {speed}, {counted(rows.questions, "question")} an image"""


def table(plans: Sequence[Plan], chosen: str) -> str:
    """Two tables with a row a strategy: what is needed and how fast it is, and the parts; the chosen one has a star."""
    return "\n\n".join("\n".join(_aligned(rows)) for rows in _tables(plans, chosen))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (list(zip(row, widths, strict=True)) for row in rows)
    return [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(line))
        for line in lines
    ]


def markdown(planner: Planner, plans: Sequence[Plan], chosen: str, checkpointing: bool) -> str:
    """The whole plan as a page."""
    tables = []
    for rows in _tables(plans, chosen):
        head, *body = (f"| {' | '.join(row)} |" for row in rows)
        tables.append("\n".join([head, "|" + " --- |" * len(rows[0]), *body]))
    said = (headline(planner, checkpointing), *tables, recommend(planner, plans, chosen), LEGEND)
    return "# Plan\n\n" + "\n\n".join(said) + "\n"


def record(planner: Planner, plans: Sequence[Plan], chosen: str) -> dict[str, Any]:
    """The plan as JSON takes it; sizes in bytes."""
    return {
        "gpu": asdict(planner.gpu),
        "gpus": planner.gpus,
        "chosen": chosen,
        "rows": asdict(planner.rows) | asdict(planner.shape),
        "training": asdict(planner.training),
        "trainable": dict(planner.trainable),
        "adapt": asdict(planner.adapt) if planner.adapt else None,
        "plans": [asdict(plan) | {"fits": plan.fits} for plan in plans],
        "recommendation": recommend(planner, plans, chosen),
    }


def _tables(plans: Sequence[Plan], chosen: str) -> tuple[list[list[str]], list[list[str]]]:
    names = [plan.strategy + (" *" if plan.strategy == chosen else "") for plan in plans]
    summary = [[name, *_summary(plan)] for name, plan in zip(names, plans, strict=True)]
    parts = [[name, *(_gib(getattr(plan, size)) for size in SIZES)] for name, plan in zip(names, plans, strict=True)]
    return [list(HEADINGS), *summary], [["strategy", *SIZES], *parts]


def _summary(plan: Plan) -> list[str]:
    return [
        _gib(plan.needed),
        "yes" if plan.fits else "no",
        _gib(plan.host) if plan.host else "-",
        "-" if plan.questions_per_second is None else f"{plan.questions_per_second:.1f}",
        *(str(rows) for rows in plan.largest),
        plan.moment,
    ]


def overrides(name: str, rows: int, checkpointing: bool, accumulation: int) -> str:
    """What to paste behind launch/train.py."""
    return (
        f"dist={name} trainer.per_device_train_batch_size={rows} "
        f"trainer.gradient_accumulation_steps={accumulation} "
        f"trainer.activation_checkpointing={str(checkpointing).lower()}"
    )


def recommend(planner: Planner, plans: Sequence[Plan], chosen: str) -> str:
    """What to set and why, a line a reason."""
    plan = next(plan for plan in plans if plan.strategy == chosen)
    run = (chosen, plan.rows, plan.checkpointing, planner.training.accumulation)
    if plan.fits:
        said = [f"Set {overrides(*run)}: it fits, {_gib(plan.needed)} of {_gib(plan.capacity)} GiB."]
    else:
        said = [f"{chosen} does not fit: it needs {_gib(plan.needed)} GiB, a GPU has {_gib(plan.capacity)}."]
        said.append(_largest_parts(plan))
    best = planner.fastest(chosen)
    if best != (chosen, plan.rows, not plan.checkpointing, run[3]):  # said below
        said += _checkpointing(planner, plan, run)
    if best is None:
        said.append(_smaller(planner, chosen))
    elif not plan.fits or planner.questions_per_second(*best) > 1.1 * planner.questions_per_second(*run):
        start = "Faster by the estimate" if plan.fits else "Set instead"
        needed, speed = planner.memory(*best[:3]).needed, planner.questions_per_second(*best)
        said.append(f"{start}, with as many rows a step: {overrides(*best)}.")
        said.append(f"That needs {_gib(needed)} GiB and makes about {counted(round(speed), 'question')} a second.")
    beaten = [other for other in plans if not other.fits and other.strategy != chosen]
    if beaten:
        names = ", ".join(f"{other.strategy} ({_gib(other.needed)} GiB)" for other in beaten)
        said.append(f"At this batch these do not fit: {names}.")
        if plan.fits:
            said.append(_largest_parts(beaten[0]))
    return "\n".join(said)


def _checkpointing(planner: Planner, plan: Plan, run: tuple[str, int, bool, int]) -> list[str]:
    other = planner.memory(plan.strategy, plan.rows, not plan.checkpointing)
    if plan.checkpointing and plan.fits and other.fits:
        gain = planner.questions_per_second(run[0], run[1], False, run[3]) / planner.questions_per_second(*run) - 1
        bound = "no faster, as what is sent takes longer than what is computed"
        return [
            f"Without activation checkpointing it needs {_gib(other.needed)} GiB, which leaves "
            f"{_gib(other.capacity - other.needed)} free, and by the estimate is "
            f"{f'{gain:.0%} faster' if gain > 0.005 else bound}."
        ]
    if plan.checkpointing and plan.fits:
        return [
            f"Without activation checkpointing it needs {_gib(other.needed)} GiB, which does not fit: activations are "
            f"{_gib(other.activations)} GiB instead of {_gib(plan.activations)}."
        ]
    if not plan.checkpointing and not plan.fits and other.fits:
        return [f"With trainer.activation_checkpointing=true it fits ({_gib(other.needed)} GiB)."]
    return []


def _largest_parts(plan: Plan) -> str:
    parts = sorted(((getattr(plan, name), name) for name in SIZES), reverse=True)[:3]
    return f"Most of {plan.strategy}'s is " + ", ".join(f"{name} ({_gib(size)} GiB)" for size, name in parts) + "."


def _smaller(planner: Planner, chosen: str) -> str:
    eight = planner.vary(training=replace(planner.training, optimizer="adamw_bnb_8bit"))
    best = eight.fastest(chosen)
    if best is not None:
        return f"With an 8-bit optimizer it fits: trainer.optim=adamw_bnb_8bit {overrides(*best)}."
    return (
        "No strategy fits a single row: use more or larger GPUs, train less of the model "
        "(trainable.vision=none, trainable.language=none or a number of last blocks), or shorten the rows "
        "(data.questions_per_row, data.row_tokens, data.max_text_tokens)."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
