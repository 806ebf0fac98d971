"""`bench.train`'s table for the 2B model: forward and backward over the same questions, with bfloat16 weights.

 recipe             a row per question, 6 per micro-batch; eager attention, logits of every position
 supervised only    the same rows with our model and transformers' attention
 shared dense       a row per image with all its questions, our attention
 packed flex        rows of 4,096 tokens with about twelve images, FlexAttention
 ..., compiled      encoder blocks and decoder layers under torch.compile
 ..., recomputed    activations of each block are computed again in the backward pass

The warm-up covers all questions, and its loss is compared with the recipe's. The first two rows are timed on every
fourth micro-batch. "of_matrix_rate" counts the operations that the row's images and tokens need
(`models.needed_flops`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench import clock, ladder, models, shapes, train
from bench.gpu import machine as gpu_machine
from bench.gpu import sizes as gpu_sizes
from bench.gpu.section import Row, Section, timed
from bench.ladder import Job, Rows, Rung
from vlmvqa.models.vlm import VLM

RECIPE_ROWS = 6  # as published


class Step(NamedTuple):
    """A row of the table, and the micro-batches that are timed: every n-th."""

    rung: Rung
    every: int = 1


def run_ladder(section: Section) -> None:
    """Measure the rows, and compare their losses."""
    if not section.cuda:
        section.notes.append("packed rows use dense attention on the CPU, and torch.compile does nothing")
        section.needs_cuda("FlexAttention's kernels, compiled blocks, times between events")
    made = make_job(section)
    for step in steps(section, made):
        section.row(step.rung.name, measure, section, made, step)
    measured = [row for row in section.rows if "loss" in row]
    for row in measured:
        row["to_first"] = row["questions_per_second"] / measured[0]["questions_per_second"]
        row["loss_difference"] = row["loss"] / measured[0]["loss"] - 1
        section.compare(f"{row['name']}: loss", abs(row["loss_difference"]), section.sizes.exact)


def make_job(section: Section) -> Job:
    """Return the model and its documents."""
    sizes = section.sizes
    model = gpu_sizes.build(sizes, section.device, sizes.half)
    documents = shapes.random_documents(gpu_sizes.SHAPES["vqav2"], sizes.images, models.vocabulary(model))
    return Job(model, documents, models.random_pixels(model, sizes.images), RECIPE_ROWS, section.cuda)


def steps(section: Section, job: Job) -> list[Step]:
    """Return the rows; those that compile are last, because compiling takes long."""
    sizes, flexible = section.sizes, (ladder.flex,) if section.cuda else ()
    asked = ladder.by_question(job)
    shared = ladder.grouped(job, [[document] for document in job.documents], sizes.dense)
    packed = packed_micro_batches(section, job)
    compiling = (*flexible, ladder.compiled if section.cuda else uncompiled)

    def fast(name: str, most: int, *settings: ladder.Setting) -> Step:
        return Step(ladder.ours(job, name, packed[most], sizes.row_tokens, settings))

    one, several = "packed flex, 1 row", f"packed flex, {sizes.packed} rows"
    return [
        Step(ladder.recipe(job, "recipe", asked, ladder.TEXT), sizes.every),
        Step(ladder.ours(job, "supervised only", asked, settings=(ladder.eager,)), sizes.every),
        Step(ladder.ours(job, "shared dense", shared)),
        Step(ladder.ours(job, "shared dense, recomputed", shared, settings=(recomputed,))),
        fast(one, 1, *flexible),
        fast(several, sizes.packed, *flexible),
        fast(f"{several}, recomputed", sizes.packed, *flexible, recomputed),
        fast(f"{several}, compiled", sizes.packed, *compiling),
        fast(f"{several}, compiled, recomputed", sizes.packed, *compiling, recomputed),
        fast(f"{one}, compiled", 1, *compiling),
    ]


def packed_micro_batches(section: Section, job: Job) -> dict[int, list[Rows]]:
    """Return micro-batches of one packed row and of several."""
    sizes = section.sizes
    rows = gpu_sizes.packed_rows(job.documents, job.model.num_image_tokens, sizes.row_tokens)
    return {most: [rows[first : first + most] for first in range(0, len(rows), most)] for most in (1, sizes.packed)}


def measure(section: Section, job: Job, step: Step) -> Row:
    """Measure a row: the loss of all questions, then the time of those that are timed."""
    rung, sizes = step.rung, section.sizes
    part = replace(rung, micro_batches=rung.micro_batches[:: step.every])
    with rung.enabled(job.model):
        batches = [rung.collate(rows) for rows in rung.micro_batches]
        with clock.PeakMemory(section.device) as memory:
            loss = train.train(job, rung, batches)
        del batches
        chosen = [part.collate(rows) for rows in part.micro_batches]
        seconds = timed(section.device, lambda: train.train(job, part, chosen), sizes.repeats, warm=0)
    job.model.zero_grad(set_to_none=True)
    questions = sum(shapes.questions_in(row) for rows in part.micro_batches for row in rows)
    return {
        "seconds": min(seconds),
        "questions_per_second": questions / min(seconds),
        "peak_bytes": memory.bytes,
        "loss": loss,
        "all_seconds": seconds,
        **gpu_machine.utilisation(section, train.flops(job, part), min(seconds)),
    }


@contextlib.contextmanager
def recomputed(model: VLM) -> Iterator[None]:
    """Recompute the blocks' activations in the backward pass."""
    model.checkpoint_activations()
    try:
        yield
    finally:
        model.vision.encoder.set_grad_checkpointing(False)
        decoder: Any = model.language.decoder  # transformers 5.17 has the second name only
        getattr(decoder, "activation_checkpointing_disable", decoder.gradient_checkpointing_disable)()


@contextlib.contextmanager
def uncompiled(model: VLM) -> Iterator[None]:
    """Compile the blocks, but run them without a compiler, where there are no kernels to measure."""
    with ladder.compiled(model), torch.compiler.set_stance("force_eager"):
        yield


def first_batch(job: Job, rows: Sequence[Rows], row_tokens: int) -> gpu_sizes.Batch:
    """Return the first micro-batch as tensors."""
    return models.make_batch(job.model, rows[0], job.pixels, row_tokens)
