"""Training, from the way it is written today to ours, a step at a time, on exactly the same questions and weights.

 1 recipe               a row per question, its image encoded again, text padded to 64 tokens; transformers' own causal
                        language model: eager attention, logits of every position, loss in fp32
 2 dynamic padding      text padded to the longest of the batch
 3 + supervised only    our model: logits where a label is
 4 + packing            several images, each with one question, in a row
 5 + sharing            an image once, with all its questions: a row each, similar lengths together
 6 + FlexAttention      several images with all their questions in a row, which a block mask makes cheap
 7 + compile            encoder blocks and decoder layers under torch.compile
 8 + cached features    the encoder's output is given: it neither runs nor trains, so only the loss is the same

Rows 1 to 3 take --recipe-batch questions at a time, the others as many rows as have --tokens tokens. Dense attention
pays for every pair of tokens in a row: 4 gains nothing by it, and 5 puts one image in a row. 7 and 8 build on the
fastest layout before them (5 on a CPU, 6 on CUDA). What is timed is forward and backward over all questions, the loss
divided by all supervised tokens; the optimizer's step, the same for all, is left out.

In fp32 every loss must equal the first to 1e-5, or the run fails.

Two columns say how far a row is from what the machine can do. "matrix rate" is MFU with the vision term: operations a
second that the row's own images and tokens need (`common.needed_flops`), over those of the best matrix product.
"floor" is the time over that in which the matrix rate does row 5's: these questions need no less.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import common
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.masks import dense_mask
from vlmvqa.sequence.rows import ANSWER, IGNORE, PADDING, Document, TokenizedQuestion

TEXT = 64  # tokens that the recipe pads text to
CLOSE = 1e-5  # what losses may differ by in fp32
TURN = 10.0  # seconds a row is timed for, at least, when it is its turn
BLOCK = 128  # FlexAttention's, and the lengths that are compiled
Batch = dict[str, Tensor]
Rows = list[list[Document]]
Setting = Callable[[VLM], AbstractContextManager[None]]


@dataclass(frozen=True)
class Job:
    """What every row of the table trains on, and how many tokens at a time."""

    model: VLM
    documents: list[Document]
    pixels: Tensor
    tokens: int
    recipe_batch: int
    compile: bool

    @property
    def supervised(self) -> int:
        return sum(len(q.answer) for d in self.documents for q in d.questions)

    @property
    def cuda(self) -> bool:
        return self.pixels.device.type == "cuda"

    def length(self, row: Sequence[Document]) -> int:
        return sum(common.length(d, self.model.vision.tokens) for d in row)


@dataclass(frozen=True)
class Rung:
    """A row of the table.

    Attributes:
        micro_batches: which documents stand in which row.
        collate: the tensors of a micro-batch.
        loss: its part of the loss of all questions.
        settings: what is switched on meanwhile.
        encoder: whether the vision encoder runs and trains.
        skipped: why it is not measured, or "".
    """

    name: str
    micro_batches: list[Rows]
    collate: Callable[[Rows], Batch]
    loss: Callable[[Batch], Tensor]
    settings: tuple[Setting, ...] = ()
    encoder: bool = True
    skipped: str = ""


# --- the rows ------------------------------------------------------------------------------------------------------


def ladder(job: Job) -> list[Rung]:
    """All rows of the table, those that are not measured too."""
    sixes, shared, packed = _by_question(job), _image_a_row(job), _in_budget(job, job.documents, job.tokens)
    alone = common.apart(job.documents)
    # At least two images a row, however long they are; on a CPU their square soon fills the memory.
    two = max(job.tokens // 2, 2 * max(job.length([d]) for d in alone))
    fast, multiple, settings = (packed, BLOCK, (flex,)) if job.cuda else (shared, 1, ())
    compiling = _ours(job, "+ compile", fast, multiple, (*settings, compiled))
    return [
        _recipe(job, "recipe", sixes, TEXT),
        _recipe(job, "dynamic padding", sixes, None),
        _ours(job, "+ supervised only", sixes),
        _ours(job, "+ packing", _in_budget(job, alone, two)),
        _ours(job, "+ sharing", shared),
        _unless(
            job.cuda, "FlexAttention has no backward on CPU", _ours(job, "+ FlexAttention", packed, BLOCK, (flex,))
        ),
        _unless(job.compile, "--compile was not given", compiling),
        _cached(job, "+ cached features", fast, multiple, compiling.settings if job.compile else settings),
    ]


def _unless(measured: bool, reason: str, rung: Rung) -> Rung:
    return rung if measured else replace(rung, skipped=reason)


def _recipe(job: Job, name: str, micro_batches: list[Rows], text: int | None) -> Rung:
    """A row per question through transformers' own causal language model.

    Args:
        text: tokens that text is padded to (None: to the longest).
    """
    lm = common.causal_lm(job.model)
    multiple = 1 if text is None else job.model.vision.tokens + text

    def collate(rows: Rows) -> Batch:
        # EOS is an input here: a token after it, of which only the label is used, which the recipe makes itself.
        longer = [[Document(d.image, [_with_eos(q) for q in d.questions]) for d in row] for row in rows]
        return common.make_batch(job.model, longer, job.pixels, multiple)

    return Rung(name, micro_batches, collate, lambda batch: _recipe_loss(job.model, lm, batch, job.supervised))


def _with_eos(question: TokenizedQuestion) -> TokenizedQuestion:
    return TokenizedQuestion(question.prompt, [*question.answer, common.PAD])


def _recipe_loss(model: VLM, lm: PreTrainedModel, batch: Batch, supervised: int) -> Tensor:
    """What one writes with transformers alone: image before text, labels of the answer, -100 elsewhere."""
    images = model.projector(model.vision(batch["pixel_values"]))
    text = lm.get_input_embeddings()(batch["input_ids"][:, images.shape[1] :])
    attention_mask: Any = (batch["document"] != PADDING).long()
    if model.mode != "causal":  # transformers has no such mode for Gemma 2, but takes its mask
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


def _ours(
    job: Job, name: str, micro_batches: list[Rows], multiple: int = 1, settings: tuple[Setting, ...] = ()
) -> Rung:
    return Rung(
        name,
        micro_batches,
        lambda rows: common.make_batch(job.model, rows, job.pixels, multiple),
        lambda batch: job.model(num_items_in_batch=job.supervised, **batch)["loss"],
        settings,
    )


def _cached(job: Job, name: str, micro_batches: list[Rows], multiple: int, settings: tuple[Setting, ...]) -> Rung:
    with torch.no_grad():
        features = torch.cat([job.model.vision(pixels) for pixels in job.pixels.split(8)])
    rung = _ours(job, name, micro_batches, multiple, (*settings, frozen_encoder))
    return replace(
        rung, encoder=False, collate=lambda rows: common.make_batch(job.model, rows, job.pixels, multiple, features)
    )


# --- which documents stand together --------------------------------------------------------------------------------


def _by_question(job: Job) -> list[Rows]:
    """A row for each question, shuffled as training meets them: not an image's questions one after the other."""
    alone = common.apart(job.documents)
    random.Random(0).shuffle(alone)
    return [
        [[document] for document in alone[start : start + job.recipe_batch]]
        for start in range(0, len(alone), job.recipe_batch)
    ]


def _image_a_row(job: Job) -> list[Rows]:
    return _grouped(job, [[document] for document in job.documents])


def _in_budget(job: Job, documents: Sequence[Document], budget: int) -> list[Rows]:
    """Rows of several documents: each, the longest first, goes to the first row that has room."""
    rows: Rows = []
    for document in sorted(documents, key=lambda d: -job.length([d])):
        room = (row for row in rows if job.length([*row, document]) <= budget)
        row = next(room, None)
        if row is None:
            rows.append([document])
        else:
            row.append(document)
    return _grouped(job, rows)


def _grouped(job: Job, rows: Rows) -> list[Rows]:
    """Micro-batches of rows of similar lengths, the longest first, that have at most `tokens` tokens with padding."""
    groups: list[Rows] = []
    for row in sorted(rows, key=job.length, reverse=True):
        if groups and (len(groups[-1]) + 1) * job.length(groups[-1][0]) <= job.tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


# --- what is switched on -------------------------------------------------------------------------------------------


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
    """Each block by itself: all have one code, so it is compiled once, and the graph never breaks."""
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


# --- measuring -----------------------------------------------------------------------------------------------------


def train(job: Job, rung: Rung, batches: Sequence[Batch]) -> float:
    """Forward and backward over micro-batches: the loss; the gradients stay in the model."""
    job.model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=job.pixels.device)
    for batch in batches:
        loss = rung.loss(batch)
        loss.backward()
        total += loss.detach()
    return total.item()


def take_turns(job: Job, rungs: Sequence[Rung], repeats: int) -> list[common.Row]:
    """Each row's numbers. The rows take turns: what else the machine does meanwhile then falls on all of them."""
    turns: list[list[common.Measured[float]]] = [[] for _ in rungs]
    for turn in range(repeats):
        for rung, found in zip(rungs, turns, strict=True):
            if not rung.skipped:
                found.append(measure(job, rung))
                print(f"  turn {turn + 1}, {rung.name}: {found[-1].seconds:.2f} s", file=sys.stderr)
    return [
        {"name": rung.name, "skipped": rung.skipped} if rung.skipped else summarise(job, rung, found)
        for rung, found in zip(rungs, turns, strict=True)
    ]


def measure(job: Job, rung: Rung) -> common.Measured[float]:
    """One row's turn: its loss, time and memory."""
    with ExitStack() as stack:
        for setting in rung.settings:
            stack.enter_context(setting(job.model))
        batches = [rung.collate(rows) for rows in rung.micro_batches]
        # On a CPU one micro-batch warms up enough; compiled code has to have met every length.
        first = batches if job.cuda or compiled in rung.settings else batches[:1]
        found = common.measure(
            lambda: train(job, rung, batches),
            job.pixels.device,
            warm=lambda: train(job, rung, first),
            at_least=TURN,
        )
    job.model.zero_grad(set_to_none=True)
    return found


def summarise(job: Job, rung: Rung, turns: Sequence[common.Measured[float]]) -> common.Row:
    seconds = median(turn.seconds for turn in turns)
    return {
        "name": rung.name,
        "seconds": seconds,
        "cpu_seconds": median(turn.cpu_seconds for turn in turns),
        "turns": [turn.seconds for turn in turns],
        "questions_per_second": common.questions_in(job.documents) / seconds,
        "peak_bytes": max((turn.peak for turn in turns if turn.peak is not None), default=None),
        "loss": turns[-1].result,
        "flops": flops(job, rung),
        "micro_batches": [[len(rows), max(job.length(row) for row in rows)] for rows in rung.micro_batches],
        "trains_encoder": rung.encoder,
    }


def flops(job: Job, rung: Rung) -> int:
    """What a row of the table needs."""
    total = 0
    for rows in rung.micro_batches:
        features = None if rung.encoder else torch.empty(len(job.pixels), 1, device=job.pixels.device)
        total += common.needed_flops(
            job.model, common.make_batch(job.model, rows, job.pixels, features=features), rung.encoder
        )
    return total


def compare(rows: list[common.Row], matrix_rate: float) -> None:
    """Add to each measured row how it stands to the others and to what the machine can do."""
    by_name = {row["name"]: row for row in rows}
    recipe, supervised, sharing = (by_name[name] for name in ("recipe", "+ supervised only", "+ sharing"))
    for row in rows:
        if "seconds" in row:
            row["ratio_to_recipe"] = recipe["seconds"] / row["seconds"]
            row["ratio_to_supervised"] = supervised["seconds"] / row["seconds"]
            row["cpu_ratio_to_recipe"] = recipe["cpu_seconds"] / row["cpu_seconds"]
            row["cpu_ratio_to_supervised"] = supervised["cpu_seconds"] / row["cpu_seconds"]
            row["loss_difference"] = row["loss"] - recipe["loss"]
            row["of_matrix_rate"] = row["flops"] / row["seconds"] / matrix_rate
            floor = sharing["flops"] if row["trains_encoder"] else row["flops"]
            row["times_floor"] = row["seconds"] * matrix_rate / floor


HEADERS = (
    "",
    "questions/s",
    "to recipe",
    "to supervised only",
    "peak MiB",
    "loss",
    "to recipe",
    "matrix rate",
    "floor",
)


def cells(row: common.Row) -> list[str]:
    if "seconds" not in row:
        return [row["name"], "not measured", *[""] * (len(HEADERS) - 2)]
    return [
        row["name"] + ("" if row["trains_encoder"] else " (encoder frozen)"),
        f"{row['questions_per_second']:.2f}",
        common.times(row["ratio_to_recipe"]),
        common.times(row["ratio_to_supervised"]),
        common.mib(row["peak_bytes"]),
        f"{row['loss']:.6f}",
        f"{row['loss_difference']:+.1e}",
        f"{100 * row['of_matrix_rate']:.0f} %",
        common.times(row["times_floor"]),
    ]


def summary(rows: Sequence[common.Row]) -> str:
    best = max((row for row in rows if row.get("trains_encoder")), key=lambda row: row["questions_per_second"])
    return (
        f"best row that trains everything: {best['name']}, {best['ratio_to_recipe']:.2f} times the recipe, "
        f"{best['ratio_to_supervised']:.2f} times dynamic padding with supervised positions only "
        f"(by processor time {best['cpu_ratio_to_recipe']:.2f} and {best['cpu_ratio_to_supervised']:.2f})"
    )


def make_job(args: argparse.Namespace) -> Job:
    shape = common.SHAPES[args.shape]
    model = common.build_model(args.model, shape, args.device, args.seed, args.mode)
    documents = common.draw_documents(shape, args.images, common.vocabulary(model), args.seed)
    pixels = common.draw_pixels(model, args.images, args.seed)
    return Job(model, documents, pixels, args.tokens, args.recipe_batch, args.compile)


def main(argv: Sequence[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = common.parser("train", __doc__)
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 1280, help="of a micro-batch, from row 4 on")
    parser.add_argument("--recipe-batch", type=int, default=6, help="questions at a time, as published")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    args = parser.parse_args(argv)
    job = make_job(args)
    machine = common.machine(args.device, job.pixels.dtype)
    print(common.describe(machine))
    print(f"{args.model}, {args.shape}: {common.questions_in(job.documents)} questions on {args.images} images")
    rows = take_turns(job, ladder(job), args.repeats)
    # Measured again: on a machine that does other work, the better of two moments is nearer to what it can do.
    again = common.matrix_rate(job.pixels.device, job.pixels.dtype)
    machine["matrix_flops_per_second"] = max(machine["matrix_flops_per_second"], again)
    compare(rows, machine["matrix_flops_per_second"])
    print(common.table(HEADERS, [cells(row) for row in rows]))
    for row in rows:
        if "skipped" in row:
            print(f"{row['name']} not measured: {row['skipped']}")
    print(summary(rows))
    common.write_json(args, machine, rows)
    far = [row["name"] for row in rows if abs(row.get("loss_difference", 0.0)) > CLOSE]
    if far and job.pixels.dtype == torch.float32:
        print(f"the loss is not the recipe's: {', '.join(far)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
