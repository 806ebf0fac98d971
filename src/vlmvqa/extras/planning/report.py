"""Format a plan as text, Markdown and JSON: tables of all strategies, recommended settings, time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from vlmvqa.errors import counted
from vlmvqa.extras.planning.gpus import GIB
from vlmvqa.extras.planning.planner import CONTEXT, FRAGMENTATION, Plan, Planner, RunChoice
from vlmvqa.extras.planning.time import StepWork, comparison, sensitivity, step_terms
from vlmvqa.extras.report.text_tables import Table, aligned, piped

Times = Sequence[tuple[str, Table]]
SIZES = ("parameters", "gradients", "optimizer", "buffers", "activations", "logits", "temporary")
TEXTS = ("formula", "constants", "source")  # headings of columns that hold no numbers
HEADINGS = ("strategy", "needed", "fits", "host", "questions/s", "max rows", "with checkpointing", "peak in")
LEGEND = f"""\
GiB per GPU. needed: peak memory plus {FRAGMENTATION:.0%} (fragmentation) and {CONTEXT / GIB:.1f} GiB (CUDA).
host: GiB of host memory, all GPUs together. questions/s: an estimate from the assumptions above.
max rows: per GPU, without and with activation checkpointing. peak in: backward pass, last reduction
of gradients, or optimizer step.
optimizer: its states, and under ZeRO the fp32 weights. buffers: for communication, and weights
gathered from shards. activations: after the decoder's forward pass, under ddp with autocast's
copies of the weights. logits: additional memory of the loss, with the output matrix's gradient.
temporary: the rest of the peak. Not all columns are in memory at the peak.
Computed from the real model without weights and the strategies' code, not measured: verify=true
measures one process on a GPU. torch_compile and evaluation are not planned.
Time: padding and recomputation are the decoder's and all blocks'; hidden is the communication that
computation covers; exposed is sent while nothing computes."""


def headline(planner: Planner, checkpointing: bool) -> str:
    """Return the planned run and the assumptions."""
    rows, shape, training, gpu = planner.rows, planner.shape, planner.training, planner.gpu
    count = sum(weight.numel for weight in planner.weights)
    trained = sum(weight.numel for weight in planner.weights if weight.trained)
    images = f"{planner.images_per_row} x {planner.num_image_tokens}"
    questions = f"{rows.max_questions} x {rows.text_tokens}"
    rates = planner.rates
    speed = f"{rates.efficiency:.0%} of {rates.rate:g} TFLOP/s, {rates.link:g} GB/s between GPUs"
    quantized = sum(weight.numel for weight in planner.weights if weight.quantized)
    return f"""\
model      {count:,} parameters, {trained:,} of them trained{f", {quantized:,} in 4 bits" if quantized else ""}
training   {training.precision}, {training.optimizer}, activation checkpointing {"on" if checkpointing else "off"}
batch      {counted(rows.rows, "row")} per GPU x {training.accumulation} accumulated
rows       {shape.tokens} tokens: {images} of images, {questions} of questions; {shape.supervised} supervised
GPUs       {planner.gpus} x {gpu.name}, {gpu.memory} GiB each for PyTorch
assumed    {speed}, overlap {rates.overlap:.0%}, {counted(rows.questions, "question")} per image"""


def table(plans: Sequence[Plan], chosen: str) -> str:
    """Return two tables with a row per strategy, a summary and the parts; a star marks the chosen one."""
    return "\n\n".join(map(aligned, _tables(plans, chosen)))


def time_tables(planner: Planner, run: RunChoice, other: tuple[str, StepWork] | None) -> list[tuple[str, Table]]:
    """Return titles and tables of a step's time: terms, constants, sensitivity, and a comparison with another run."""
    work, rates = planner.work(run), planner.rates
    terms = step_terms(work, rates)
    seconds = sum(term.seconds for term in terms)
    rows = [[term.name, term.formula, f"{term.seconds:.3f}", term.constants] for term in terms]
    total = ["sum", f"{work.questions:.0f} questions", f"{seconds:.3f}", f"{work.questions / seconds:.1f} questions/s"]
    found = [
        ("A step, term by term:", [["term", "formula", "seconds", "constants"], *rows, total]),
        ("Constants:", [["constant", "value", "source"], *map(list, rates.sources())]),
        ("Questions per second with other constants:", sensitivity(work, rates)),
    ]
    if other is not None and other[1] != work:
        found.append((f"Compared with experiment={other[0]}:", comparison(work, rates, *other)))
    return found


def markdown(planner: Planner, plans: Sequence[Plan], chosen: str, checkpointing: bool, times: Times = ()) -> str:
    """Return the plan as a Markdown page."""
    timed = (f"{title}\n\n{piped(rows)}" for title, rows in times)
    tables = map(piped, _tables(plans, chosen))
    sections = (headline(planner, checkpointing), *tables, recommend(planner, plans, chosen), *timed, LEGEND)
    return "# Plan\n\n" + "\n\n".join(sections) + "\n"


def record(planner: Planner, plans: Sequence[Plan], chosen: str, times: Times = ()) -> dict[str, Any]:
    """Return the plan for JSON; sizes in bytes."""
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
        "time": {
            title.rstrip(":"): [dict(zip(head, row, strict=True)) for row in rows] for title, (head, *rows) in times
        },
    }


def _tables(plans: Sequence[Plan], chosen: str) -> tuple[Table, Table]:
    summary, parts = [list(HEADINGS)], [["strategy", *SIZES]]
    for plan in plans:
        name = plan.strategy + (" *" if plan.strategy == chosen else "")
        host = _gib(plan.host) if plan.host else "-"
        speed = "-" if plan.questions_per_second is None else f"{plan.questions_per_second:.1f}"
        fits = "yes" if plan.fits else "no"
        summary.append([name, _gib(plan.needed), fits, host, speed, *map(str, plan.largest), plan.moment])
        parts.append([name, *(_gib(getattr(plan, size)) for size in SIZES)])
    return summary, parts


def overrides(run: RunChoice) -> str:
    """Return the overrides of launch/train.py for a run."""
    return (
        f"dist={run.strategy} trainer.per_device_train_batch_size={run.rows} "
        f"trainer.gradient_accumulation_steps={run.accumulation} "
        f"trainer.activation_checkpointing={str(run.checkpointing).lower()}"
    )


def recommend(planner: Planner, plans: Sequence[Plan], chosen: str) -> str:
    """Return lines with the recommended settings and their reasons."""
    plan = next(plan for plan in plans if plan.strategy == chosen)
    run = RunChoice(chosen, plan.rows, plan.checkpointing, planner.training.accumulation)
    if plan.fits:
        lines = [f"Set {overrides(run)}: it fits, {_gib(plan.needed)} of {_gib(plan.capacity)} GiB."]
    else:
        lines = [f"{chosen} does not fit: it needs {_gib(plan.needed)} GiB, a GPU has {_gib(plan.capacity)}."]
        lines.append(_largest_parts(plan))
    best = planner.fastest(chosen)
    if best != run._replace(checkpointing=not run.checkpointing):  # recommended below
        lines += _checkpointing(planner, plan, run)
    if best is None:
        lines.append(_if_nothing_fits(planner, chosen))
    elif not plan.fits or planner.questions_per_second(best) > 1.1 * planner.questions_per_second(run):
        start = "Estimated to be faster" if plan.fits else "Set instead"
        needed = planner.memory(best.strategy, best.rows, best.checkpointing).needed
        speed = counted(round(planner.questions_per_second(best)), "question")
        lines.append(f"{start}, with the same number of rows per step: {overrides(best)}.")
        lines.append(f"It needs {_gib(needed)} GiB and processes about {speed} per second.")
    too_large = [other for other in plans if not other.fits and other.strategy != chosen]
    if too_large:
        names = ", ".join(f"{other.strategy} ({_gib(other.needed)} GiB)" for other in too_large)
        lines.append(f"With this batch these don't fit: {names}.")
        if plan.fits:
            lines.append(_largest_parts(too_large[0]))
    return "\n".join(lines)


def _checkpointing(planner: Planner, plan: Plan, run: RunChoice) -> list[str]:
    other = planner.memory(plan.strategy, plan.rows, not plan.checkpointing)
    if plan.checkpointing and plan.fits:
        without = f"Without activation checkpointing it needs {_gib(other.needed)} GiB, which"
        if not other.fits:
            activations = f"{_gib(other.activations)} GiB instead of {_gib(plan.activations)}"
            return [f"{without} does not fit: activations are {activations}."]
        gain = planner.questions_per_second(run._replace(checkpointing=False)) / planner.questions_per_second(run) - 1
        speed = f"{gain:.0%} faster" if gain > 0.005 else "no faster"
        return [f"{without} leaves {_gib(other.capacity - other.needed)} free, and is estimated to be {speed}."]
    if not plan.checkpointing and not plan.fits and other.fits:
        return [f"With trainer.activation_checkpointing=true it fits ({_gib(other.needed)} GiB)."]
    return []


def _largest_parts(plan: Plan) -> str:
    parts = sorted(((getattr(plan, name), name) for name in SIZES), reverse=True)[:3]
    largest = ", ".join(f"{name} ({_gib(size)} GiB)" for size, name in parts)
    return f"The largest parts of {plan.strategy} are {largest}."


def _if_nothing_fits(planner: Planner, chosen: str) -> str:
    eight_bit = planner.vary(training=replace(planner.training, optimizer="adamw_bnb_8bit"))
    best = eight_bit.fastest(chosen)
    if best is not None:
        return f"With an 8-bit optimizer it fits: trainer.optim=adamw_bnb_8bit {overrides(best)}."
    return (
        "No strategy fits a single row: use more or larger GPUs, train less of the model "
        "(trainable.vision=none, trainable.language=none or a number of last blocks), or shorten the rows "
        "(data.questions_per_row, data.row_tokens, data.max_text_tokens)."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
