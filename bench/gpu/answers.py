"""Answers: transformers' `generate` in padded batches, and ours in shared rows, in bfloat16 and fp32.

As in `bench.generate`: greedy, 4 tokens per answer, pattern causal, where both compute the same function. In fp32 both
must answer two images token for token alike, ours also with a static cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench import clock, generate, models, shapes
from bench.generate import Answers, Job
from bench.gpu import sizes as gpu_sizes
from bench.gpu.section import Row, Section, timed
from vlmvqa.models.interface import cast_parameters
from vlmvqa.models.vlm import VLM

TOKENS, COMPARED, PADDED = 4, 2, 64  # tokens per answer, images compared, questions of a padded batch


def answers(section: Section) -> None:
    """Measure both, and compare their tokens."""
    sizes = section.sizes
    model = gpu_sizes.build(sizes, section.device, sizes.half).eval()
    most = max(*sizes.answer_batches, sizes.answer_images)
    documents = shapes.without_answers(
        shapes.random_documents(gpu_sizes.SHAPES["vqav2"], most, models.vocabulary(model))
    )
    job = Job(documents[: sizes.answer_images], models.random_pixels(model, most), PADDED, TOKENS)
    half = str(sizes.half).removeprefix("torch.")
    section.row(f"transformers, padded batches, encoded once, {half}", _time, section, job, _theirs(model))
    for dtype in dict.fromkeys((sizes.half, torch.float32)):
        cast_parameters(model, dtype)
        for batch in sizes.answer_batches:
            count = max(batch, sizes.answer_images)
            job = Job(documents[:count], models.random_pixels(model, count), batch, TOKENS)
            name = f"ours, {batch} images per call, {str(dtype).removeprefix('torch.')}"
            section.row(name, _time, section, job, partial(generate.ours, model))
            section.row(f"{name}, static cache", _time, section, job, partial(generate.ours, model, static_cache=True))
    if not section.cuda:
        section.needs_cuda("bfloat16")
    section.row("tokens in fp32", _equal, section, model, documents)


def _theirs(model: VLM) -> Callable[[Job], Answers]:
    causal_lm = models.causal_lm(model).eval()
    return lambda job: generate.theirs(model, causal_lm, job, encode_once=True)


def _time(section: Section, job: Job, answer: Callable[[Job], Answers]) -> Row:
    with clock.PeakMemory(section.device) as memory:
        answer(job)
    seconds = timed(section.device, lambda: answer(job), 1, warm=0)
    per_second = len(job.asked) / min(seconds)
    return {"seconds": min(seconds), "answers_per_second": per_second, "peak_bytes": memory.bytes}


def _equal(section: Section, model: VLM, documents: list[shapes.Document]) -> Row:
    cast_parameters(model, torch.float32)
    job = Job(documents[:COMPARED], models.random_pixels(model, COMPARED), PADDED, TOKENS)
    ours, static, theirs = generate.ours(model, job), generate.ours(model, job, static_cache=True), _theirs(model)(job)
    different = sum(one != other for one, other in zip(ours, theirs, strict=True))
    section.compare("answers that differ from transformers' in fp32", different, 0)
    replayed = sum(one != other for one, other in zip(ours, static, strict=True))
    section.compare("answers that a static cache changes in fp32", replayed, 0)
    return {"answers": len(ours), "different": different, "different_with_static_cache": replayed}
