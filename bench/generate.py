"""Answers per second with shared rows, compared with transformers' `generate` on the same weights.

    python -m bench.generate --model mid --shape vqav2

    one at a time      transformers' `generate`, one question per call, with the image's features in `inputs_embeds`
    padded batches     the same with `--batch` questions per call, padded on the left
    ..., encoded once  the same, but the vision encoder runs once per image and call, not once per question
    shared rows        ours: `--batch` images per call, each in one row with all its questions
    shared rows, PATTERN  ours with `--attention-pattern` (default: our default), which is another function

All use the same weights and questions, greedy decoding and a KV cache. Pattern `causal` is compared, because there
transformers' mask is the same function as ours; answers that are equal token for token are counted.

Random weights never generate an end token, so every answer has `--tokens` tokens: 4 by default, more than VQAv2's
answers with their EOS, so that no contender gains by stopping early. With `--ends 0.5` the second tokens of half the
questions become end tokens for all contenders: answers then have different lengths, and a padded batch waits for its
longest.

"floor" is the measured time divided by the least possible time: the operations of one forward pass over each image,
prompt and answer at the machine's matrix rate, or reading the decoder's weights once per token of the longest answer,
whichever takes longer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import clock, models, shapes, tables
from vlmvqa.models.generation import generate
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import Document, TokenizedQuestion

ImageQuestion = tuple[int, TokenizedQuestion]  # index of the image, and the question
Answers = list[list[int]]


@dataclass(frozen=True)
class Job:
    """The input of every contender: questions without answers, `pixels float[I, 3, H, H]`, batch size and length."""

    documents: Sequence[Document]
    pixels: Tensor
    batch: int
    tokens: int
    ends: frozenset[int] = frozenset()

    @property
    def asked(self) -> list[ImageQuestion]:
        return [(document.images[0], question) for document in self.documents for question in document.questions]


@torch.no_grad()
def theirs(model: VLM, causal_lm: Any, job: Job, encode_once: bool = False) -> Answers:
    """Generate answers with transformers' `generate`, without the end token."""
    # Set, not passed: None as an argument would mean the config's own end token.
    causal_lm.generation_config.update(eos_token_id=sorted(job.ends) or None, pad_token_id=0)
    answers: Answers = []
    for start in range(0, len(job.asked), job.batch):
        embeds, mask = embed(model, job.asked[start : start + job.batch], job.pixels, encode_once)
        written = causal_lm.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=job.tokens, do_sample=False
        )
        answers += [until(answer, job.ends) for answer in written.tolist()]
    return answers


def embed(model: VLM, asked: Sequence[ImageQuestion], pixels: Tensor, encode_once: bool) -> tuple[Tensor, Tensor]:
    """Return `inputs_embeds float[B, T, D]` and `attention_mask int64[B, T]`, one question per row, left-padded."""
    images = [image for image, _ in asked]
    encoded = sorted(set(images)) if encode_once else images
    features = model.image_embeddings({"pixel_values": pixels[encoded]}).unflatten(0, (len(encoded), -1))
    if encode_once:
        features = features[[encoded.index(image) for image in images]]
    texts = [model.language.embed(torch.tensor(question.prompt, device=pixels.device)) for _, question in asked]
    longest = max(map(len, texts))
    rows = [
        F.pad(torch.cat([image, text]), (0, 0, longest - len(text), 0))
        for image, text in zip(features, texts, strict=True)
    ]
    mask = [[0] * (longest - len(text)) + [1] * (features.shape[1] + len(text)) for text in texts]
    return torch.stack(rows), torch.tensor(mask, device=pixels.device)


def ours(model: VLM, job: Job, static_cache: bool = False) -> Answers:
    """Generate answers with the project's `generate`: `job.batch` images per call, each a row with all questions."""
    answers: Answers = []
    decoding = GenerationSettings(job.tokens, static_cache=static_cache)
    for start in range(0, len(job.documents), job.batch):
        rows = [[document] for document in job.documents[start : start + job.batch]]
        batch = models.make_batch(model, rows, job.pixels)
        answers += [written.tokens for written in generate(model, batch, job.ends, decoding)]
    return answers


def until(answer: Sequence[int], ends: frozenset[int]) -> list[int]:
    """Return the tokens before the first end token."""
    end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    return list(answer[:end])


def end_tokens(answers: Answers, share: float, seed: int) -> frozenset[int]:
    """Return the second tokens of a share of the answers."""
    longer = [answer for answer in answers if len(answer) > 1]
    return frozenset(answer[1] for answer in random.Random(seed).sample(longer, round(share * len(longer))))


@dataclass(frozen=True)
class Contender:
    """A way to answer a job; if `same`, its answers should equal those of the first contender."""

    name: str
    answer: Callable[[Job], Answers]
    same: bool = True


def contenders(model: VLM, other_pattern: str) -> list[Contender]:
    causal_lm: Any = models.causal_lm(model).eval()

    def under_other_pattern(job: Job) -> Answers:
        attention_pattern, model.attention_pattern = model.attention_pattern, other_pattern
        try:
            return ours(model, job)
        finally:
            model.attention_pattern = attention_pattern

    return [
        Contender("one at a time", lambda job: theirs(model, causal_lm, replace(job, batch=1))),
        Contender("padded batches", lambda job: theirs(model, causal_lm, job)),
        Contender("padded batches, encoded once", lambda job: theirs(model, causal_lm, job, encode_once=True)),
        Contender("shared rows", lambda job: ours(model, job)),
        Contender(f"shared rows, {other_pattern}", under_other_pattern, same=False),
    ]


def take_turns(found: Sequence[Contender], job: Job, repeats: int) -> list[list[clock.Measured[Answers]]]:
    """Measure the contenders alternately, so that other load on the machine affects all of them."""
    device = job.pixels.device
    turns: list[list[clock.Measured[Answers]]] = [[] for _ in found]
    for _ in range(repeats):
        for contender, measured in zip(found, turns, strict=True):
            measured.append(clock.measure(partial(contender.answer, job), device))
            print(f"  {contender.name}: {len(job.asked) / measured[-1].seconds:.3g} answers/s", flush=True)
    return turns


def compare(found: Sequence[Contender], job: Job, repeats: int, floor: float) -> list[tables.Row]:
    """Return a row per contender.

    Args:
        floor: the least possible seconds.
    """
    turns = take_turns(found, job, repeats)
    reference = turns[0][0].result
    rows: list[tables.Row] = []
    for contender, measured in zip(found, turns, strict=True):
        equal = sum(a == b for a, b in zip(measured[0].result, reference, strict=True)) if contender.same else None
        seconds = min(one.seconds for one in measured)
        rows.append(
            {
                "name": contender.name,
                "answers_per_second": len(job.asked) / seconds,
                "times_floor": seconds / floor,
                "peak_bytes": measured[0].peak,
                "equal_answers": equal,
            }
        )
    for row in rows:
        for key, base in (("to_one_at_a_time", rows[0]), ("to_padded_batches", rows[1])):
            row[key] = row["answers_per_second"] / base["answers_per_second"]
    return rows


def least_seconds(model: VLM, job: Job, answers: Answers, machine: tables.Row) -> float:
    """Return the least possible time of these answers."""
    written = iter(answers)
    answered = [
        Document(d.images, [TokenizedQuestion(q.prompt, next(written)) for q in d.questions]) for d in job.documents
    ]
    batch = models.make_batch(model, [[document] for document in answered], job.pixels)
    model.requires_grad_(False)
    weights = sum(weight.nbytes for weight in model.language.parameters())
    flops = models.needed_flops(model, batch)
    model.requires_grad_(True)
    return tables.least_seconds(machine, flops, weights * max(map(len, answers)))


def main(arguments: Sequence[str] | None = None) -> list[tables.Row]:
    parser = tables.parser("generate", __doc__)
    parser.set_defaults(attention_pattern="blockwise_prefix")
    parser.add_argument("--batch", type=int, default=16, help="rows per call (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4, help="tokens per answer, at most (default: %(default)s)")
    parser.add_argument("--ends", type=float, default=0.0, help="share of answers made to end (default: %(default)s)")
    args = parser.parse_args(arguments)

    shape = shapes.SHAPES[args.shape]
    model = models.build_model(args.model, shape, args.device, args.seed).eval()
    documents = shapes.random_documents(shape, args.images, models.vocabulary(model), args.seed)
    job = Job(
        shapes.without_answers(documents), models.random_pixels(model, args.images, args.seed), args.batch, args.tokens
    )
    if args.ends:
        job = replace(job, ends=end_tokens(ours(model, job), args.ends, args.seed))
    machine = tables.machine(args.device, next(model.parameters()).dtype)
    print(tables.describe(machine))

    answers = ours(model, job)
    floor = least_seconds(model, job, answers, machine)
    rows = compare(contenders(model, args.attention_pattern), job, args.repeats, floor)
    lengths = [min(len(answer) + 1, args.tokens) for answer in answers]  # the end token is also a step
    steps = sum(lengths) / len(lengths)
    print(
        f"{len(job.asked)} questions about {args.images} images of {model.num_image_tokens} tokens; {steps:.1f} "
        f"answer ({'random weights never end one' if not args.ends else f'{len(job.ends)} end tokens'})"
    )
    shown = [
        (
            row["name"],
            f"{row['answers_per_second']:.3g}",
            tables.times(row["to_one_at_a_time"]),
            tables.times(row["to_padded_batches"]),
            tables.times(row["times_floor"]),
            tables.mib(row["peak_bytes"]),
            "" if row["equal_answers"] is None else f"{row['equal_answers']} of {len(job.asked)}",
        )
        for row in rows
    ]
    headers = ("", "answers/s", "to one at a time", "to padded batches", "floor", "peak MiB", "same tokens")
    print(tables.table(headers, shown))
    tables.write_json(args, machine, rows, questions=len(job.asked), tokens_an_answer=steps)
    return rows


if __name__ == "__main__":
    main()
