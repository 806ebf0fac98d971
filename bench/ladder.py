"""The rows of `bench.train`'s table: layout of the documents, batch, loss and enabled features."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import models, shapes
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.masks import dense_mask
from vlmvqa.sequence.rows import ANSWER, IGNORE, PADDING, Document, TokenizedQuestion

TEXT = 64  # length to which the recipe pads text
BLOCK = 128  # FlexAttention's block; compiled lengths are multiples of it
Batch = dict[str, Tensor]
Rows = list[list[Document]]
Setting = Callable[[VLM], AbstractContextManager[None]]


@dataclass(frozen=True)
class Job:
    """The model and data of every row of the table, and the rows per batch."""

    model: VLM
    documents: list[Document]
    pixels: Tensor
    batch: int
    compile: bool

    @property
    def supervised(self) -> int:
        return sum(len(q.answer) for d in self.documents for q in d.questions)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch of the recipe."""
        return self.batch * (self.model.num_image_tokens + TEXT)

    @property
    def cuda(self) -> bool:
        return self.pixels.device.type == "cuda"

    def length(self, row: Sequence[Document]) -> int:
        return sum(shapes.length(d, self.model.num_image_tokens) for d in row)


@dataclass(frozen=True)
class Rung:
    """A row of the table.

    Attributes:
        micro_batches: the documents of each row.
        collate: builds the tensors of a micro-batch.
        loss: computes a micro-batch's part of the loss of all questions.
        settings: features that are enabled.
        skipped: why the row is not measured, or "".
    """

    name: str
    micro_batches: list[Rows]
    collate: Callable[[Rows], Batch]
    loss: Callable[[Batch], Tensor]
    settings: tuple[Setting, ...] = ()
    skipped: str = ""

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder runs and trains; otherwise its output is an input."""
        return frozen_encoder not in self.settings

    @contextmanager
    def enabled(self, model: VLM) -> Iterator[None]:
        with ExitStack() as stack:
            for setting in self.settings:
                stack.enter_context(setting(model))
            yield


# --- the rows ------------------------------------------------------------------------------------------------------


def rungs(job: Job) -> list[Rung]:
    """Return all rows of the table, including those that are not measured."""
    asked, alone = by_question(job), shapes.apart(job.documents)
    shared = grouped(job, [[document] for document in job.documents], job.batch)
    # Half of a micro-batch, but at least two images: on a CPU the attention of longer rows soon fills the memory.
    half = max(job.tokens // 2, 2 * max(job.length([d]) for d in alone))
    packed = [[row] for row in _in_budget(job, job.documents, -(-job.tokens // BLOCK) * BLOCK)]
    fast, multiple, settings = (packed, BLOCK, (flex,)) if job.cuda else (shared, 1, ())
    compiling = ours(job, "+ compile", fast, multiple, (*settings, compiled))
    return [
        recipe(job, "recipe", asked, TEXT),
        recipe(job, "dynamic padding", asked, None),
        ours(job, "+ supervised only", asked, settings=(eager,)),
        ours(job, "+ our attention", asked),
        ours(job, "+ packing", grouped(job, _in_budget(job, alone, half), 2)),
        ours(job, "+ sharing", shared),
        _unless(job.cuda, "FlexAttention has no backward on CPU", ours(job, "+ FlexAttention", packed, BLOCK, (flex,))),
        _unless(job.compile, "--compile was not given", compiling),
        _cached(job, "+ cached features", fast, multiple, compiling.settings if job.compile else settings),
    ]


def _unless(measured: bool, reason: str, rung: Rung) -> Rung:
    return rung if measured else replace(rung, skipped=reason)


def recipe(job: Job, name: str, micro_batches: list[Rows], text: int | None) -> Rung:
    """Return the row that trains transformers' causal language model, with a row per question.

    Args:
        text: length to which text is padded (None: the longest).
    """
    lm = models.causal_lm(job.model)
    multiple = 1 if text is None else job.model.num_image_tokens + text

    def collate(rows: Rows) -> Batch:
        # EOS is an input here, so a token follows it; only its label would be used, and the recipe sets labels itself.
        longer = [[Document(d.images, [_with_eos(q) for q in d.questions]) for d in row] for row in rows]
        return models.make_batch(job.model, longer, job.pixels, multiple)

    return Rung(name, micro_batches, collate, lambda batch: _recipe_loss(job.model, lm, batch, job.supervised))


def _with_eos(question: TokenizedQuestion) -> TokenizedQuestion:
    return TokenizedQuestion(question.prompt, [*question.answer, shapes.PAD])


def _recipe_loss(model: VLM, lm: PreTrainedModel, batch: Batch, supervised: int) -> Tensor:
    """Compute the loss with transformers alone: image before text, answers as labels, -100 elsewhere."""
    images = model.projector(model.vision(batch["pixel_values"]))
    text = lm.get_input_embeddings()(batch["input_ids"][:, images.shape[1] :])
    attention_mask: Any = (batch["document"] != PADDING).long()
    if model.attention_pattern != "causal":  # transformers' Gemma 2 lacks the pattern, but accepts a mask
        seen = dense_mask(model.tokens(batch), model.tokens(batch))
        added = torch.zeros_like(seen, dtype=text.dtype).masked_fill(~seen, torch.finfo(text.dtype).min)
        attention_mask = {"full_attention": added, "sliding_attention": added}
    answers = (batch["role"] == ANSWER) & (batch["document"] != PADDING)
    output = lm(
        inputs_embeds=torch.cat([images, text], dim=1),
        attention_mask=attention_mask,
        labels=batch["input_ids"].where(answers, IGNORE),
        num_items_in_batch=supervised,
        use_cache=False,
    )
    loss: Tensor = output.loss
    return loss


def ours(job: Job, name: str, micro_batches: list[Rows], multiple: int = 1, settings: tuple[Setting, ...] = ()) -> Rung:
    """Return a row with our model and loss.

    Args:
        multiple: the length of rows is rounded up to a multiple of this.
    """
    return Rung(
        name,
        micro_batches,
        lambda rows: models.make_batch(job.model, rows, job.pixels, multiple),
        lambda batch: job.model(num_items_in_batch=job.supervised, **batch)["loss"],
        settings,
    )


def _cached(job: Job, name: str, micro_batches: list[Rows], multiple: int, settings: tuple[Setting, ...]) -> Rung:
    with torch.no_grad():
        features = torch.cat([job.model.vision(pixels) for pixels in job.pixels.split(8)])
    rung = ours(job, name, micro_batches, multiple, (*settings, frozen_encoder))
    return replace(rung, collate=lambda rows: models.make_batch(job.model, rows, job.pixels, multiple, features))


# --- layouts -------------------------------------------------------------------------------------------------------


def by_question(job: Job) -> list[Rows]:
    """Return a row per question, shuffled as in training, so that an image's questions are not consecutive."""
    alone = shapes.apart(job.documents)
    random.Random(0).shuffle(alone)
    return [[[document] for document in alone[start : start + job.batch]] for start in range(0, len(alone), job.batch)]


def _in_budget(job: Job, documents: Sequence[Document], budget: int) -> Rows:
    """Pack documents into rows as our training does; a document longer than the budget extends it."""
    from vlmvqa.data.packing import Packing  # here, because `bench.gpu` uses this file without `vlmvqa.data`

    lengths = [job.length([document]) for document in documents]
    plan = Packing(lengths, max(budget, *lengths), seed=0).plan(epoch=0)
    return [[documents[number] for number in plan[row]] for row in range(len(plan))]


def grouped(job: Job, rows: Rows, most: int) -> list[Rows]:
    """Group rows of similar lengths into as few micro-batches as possible, of about equal size."""
    rows = sorted(rows, key=job.length, reverse=True)
    count = -(-len(rows) // most)
    cuts = [round(number * len(rows) / count) for number in range(count + 1)]
    return [rows[start:end] for start, end in pairwise(cuts)]


# --- features ------------------------------------------------------------------------------------------------------


@contextmanager
def eager(model: VLM) -> Iterator[None]:
    """Use transformers' eager attention."""
    model.language.decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.language.set_attention(model.language.attention)


@contextmanager
def flex(model: VLM) -> Iterator[None]:
    before = model.language.attention
    model.language.set_attention("flex")
    try:
        yield
    finally:
        model.language.set_attention(before)


@contextmanager
def compiled(model: VLM) -> Iterator[None]:
    """Compile each block separately: all share one code object, so it is compiled once without graph breaks."""
    blocks = [*model.vision.blocks, *model.language.blocks]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def frozen_encoder(model: VLM) -> Iterator[None]:
    model.vision.requires_grad_(False)
    try:
        yield
    finally:
        model.vision.requires_grad_(True)
