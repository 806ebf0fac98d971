"""Training speed, from a plain transformers recipe to ours step by step, on the same questions and weights.

 1 recipe               one row per question with its own copy of the image, text padded to 64 tokens; transformers'
                        causal language model: eager attention, logits of every position, loss in fp32
 2 dynamic padding      text padded to the longest of the batch
 3 + supervised only    our model: logits of supervised positions only; attention as in transformers
 4 + our attention      scores, cap and softmax in four passes over the scores instead of seven, without key positions
                        that no row attends to
 5 + packing            several images, each with one question, in a row
 6 + sharing            each image once with all its questions, one image per row, similar lengths together
 7 + FlexAttention      several images with all their questions in a row, made cheap by a block mask
 8 + compile            encoder blocks and decoder layers under torch.compile
 9 + cached features    the encoder's output is an input: the encoder neither runs nor trains, so only the loss is equal

All use --batch rows per batch; rows of several images (5 and 7) are fewer, and hold as many tokens as --batch rows of
the recipe. Dense attention computes every pair of tokens in a row, so 5 gains nothing, and 6 has one image per row.
8 and 9 build on the fastest layout before them (6 on a CPU, 7 on CUDA). The time is that of forward and backward over
all questions, with the loss divided by all supervised tokens; the optimizer's step, equal for all, is excluded.

In fp32 every loss must equal the first up to 1e-5, or the run fails.

Two columns compare a row with the machine's limits. "matrix rate" is MFU with the vision term: the FLOP/s that the
row's images and tokens need (`models.needed_flops`), divided by those of the best matrix product. "floor" is the
measured time divided by the least possible time: row 6's operations at the matrix rate, or reading the weights twice
and writing their gradient once at the rate of a large copy, whichever takes longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench import clock, ladder, models, shapes, tables
from bench.ladder import Batch, Job, Rung

CLOSE = 1e-5  # largest allowed difference of losses in fp32
TURN = 20.0  # least seconds of a turn


def train(job: Job, rung: Rung, batches: Sequence[Batch]) -> float:
    """Run forward and backward over micro-batches and return the loss; the gradients stay in the model."""
    job.model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=job.pixels.device)
    for batch in batches:
        loss = rung.loss(batch)
        loss.backward()
        total += loss.detach()
    return total.item()


def take_turns(job: Job, rungs: Sequence[Rung], repeats: int) -> list[tables.Row]:
    """Measure the rows alternately, so that other load on the machine affects all of them."""
    turns: list[list[clock.Measured[float]]] = [[] for _ in rungs]
    for turn in range(repeats):
        for rung, found in zip(rungs, turns, strict=True):
            if not rung.skipped:
                found.append(measure(job, rung))
                print(f"  turn {turn + 1}, {rung.name}: {found[-1].seconds:.2f} s", file=sys.stderr)
    return [
        {"name": rung.name, "skipped": rung.skipped} if rung.skipped else summarise(job, rung, found)
        for rung, found in zip(rungs, turns, strict=True)
    ]


def measure(job: Job, rung: Rung) -> clock.Measured[float]:
    """Measure loss, time and memory of one row."""
    with rung.enabled(job.model):
        batches = [rung.collate(rows) for rows in rung.micro_batches]
        # On a CPU two micro-batches are enough to warm up, and the second, with gradients allocated, uses the most
        # memory; compiled code must have seen every length.
        first = batches if job.cuda or ladder.compiled in rung.settings else batches[:2]
        found = clock.measure(
            lambda: train(job, rung, batches),
            job.pixels.device,
            warm=lambda: train(job, rung, first),
            at_least=TURN,
        )
    job.model.zero_grad(set_to_none=True)
    return found


def summarise(job: Job, rung: Rung, turns: Sequence[clock.Measured[float]]) -> tables.Row:
    seconds = min(turn.seconds for turn in turns)
    with rung.enabled(job.model):
        moved = models.trained_bytes(job.model)
    return {
        "name": rung.name,
        "seconds": seconds,
        "cpu_seconds": min(turn.cpu_seconds for turn in turns),
        "turns": [turn.seconds for turn in turns],
        "questions_per_second": shapes.questions_in(job.documents) / seconds,
        "peak_bytes": max((turn.peak for turn in turns if turn.peak is not None), default=None),
        "loss": turns[-1].result,
        "flops": flops(job, rung),
        "bytes": moved,
        "micro_batches": [[len(rows), max(job.length(row) for row in rows)] for rows in rung.micro_batches],
        "trains_encoder": rung.trains_encoder,
    }


def flops(job: Job, rung: Rung) -> int:
    """Return the FLOPs that a row of the table needs."""
    features = None if rung.trains_encoder else torch.empty(len(job.pixels), 1, device=job.pixels.device)
    with rung.enabled(job.model):  # frozen parameters need no gradient
        batches = (models.make_batch(job.model, rows, job.pixels, features=features) for rows in rung.micro_batches)
        return sum(models.needed_flops(job.model, batch) for batch in batches)


def compare(rows: list[tables.Row], machine: tables.Row) -> None:
    """Add to each measured row its comparison with the others and with the machine's limits."""
    by_name = {row["name"]: row for row in rows}
    recipe, supervised, sharing = (by_name[name] for name in ("recipe", "+ supervised only", "+ sharing"))
    for row in rows:
        if "seconds" in row:
            row["ratio_to_recipe"] = recipe["seconds"] / row["seconds"]
            row["ratio_to_supervised"] = supervised["seconds"] / row["seconds"]
            row["cpu_ratio_to_recipe"] = recipe["cpu_seconds"] / row["cpu_seconds"]
            row["cpu_ratio_to_supervised"] = supervised["cpu_seconds"] / row["cpu_seconds"]
            row["loss_difference"] = row["loss"] - recipe["loss"]
            row["of_matrix_rate"] = row["flops"] / row["seconds"] / machine["matrix_flops_per_second"]
            needed = sharing["flops"] if row["trains_encoder"] else row["flops"]
            row["times_floor"] = row["seconds"] / tables.least_seconds(machine, needed, row["bytes"])


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


def cells(row: tables.Row) -> list[str]:
    if "seconds" not in row:
        return [row["name"], "not measured", *[""] * (len(HEADERS) - 2)]
    return [
        row["name"] + ("" if row["trains_encoder"] else " (encoder frozen)"),
        f"{row['questions_per_second']:.2f}",
        tables.times(row["ratio_to_recipe"]),
        tables.times(row["ratio_to_supervised"]),
        tables.mib(row["peak_bytes"]),
        f"{row['loss']:.6f}",
        f"{row['loss_difference']:+.1e}",
        f"{100 * row['of_matrix_rate']:.0f} %",
        tables.times(row["times_floor"]),
    ]


def summary(rows: Sequence[tables.Row]) -> str:
    best = max((row for row in rows if row.get("trains_encoder")), key=lambda row: row["questions_per_second"])
    return (
        f"best row that trains everything: {best['name']}, {best['ratio_to_recipe']:.2f} times the recipe, "
        f"{best['ratio_to_supervised']:.2f} times dynamic padding with supervised positions only "
        f"(by processor time {best['cpu_ratio_to_recipe']:.2f} and {best['cpu_ratio_to_supervised']:.2f})"
    )


def make_job(args: argparse.Namespace) -> Job:
    shape = shapes.SHAPES[args.shape]
    model = models.build_model(args.model, shape, args.device, args.seed, args.attention_pattern)
    documents = shapes.random_documents(shape, args.images, models.vocabulary(model), args.seed)
    pixels = models.random_pixels(model, args.images, args.seed)
    return Job(model, documents, pixels, args.batch, args.compile)


def main(argv: Sequence[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = tables.parser("train", __doc__, images=12)
    parser.add_argument("--batch", type=int, default=6, help="rows of a micro-batch (default: 6, as published)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    args = parser.parse_args(argv)
    job = make_job(args)
    machine = tables.machine(args.device, job.pixels.dtype)
    print(tables.describe(machine))
    print(f"{args.model}, {args.shape}: {shapes.questions_in(job.documents)} questions on {args.images} images")
    rows = take_turns(job, ladder.rungs(job), args.repeats)
    # Measured again: under other load, the better of two measurements is nearer to the machine's peak.
    again = clock.matrix_rate(job.pixels.device, job.pixels.dtype)
    machine["matrix_flops_per_second"] = max(machine["matrix_flops_per_second"], again)
    compare(rows, machine)
    print(tables.table(HEADERS, [cells(row) for row in rows]))
    for row in rows:
        if "skipped" in row:
            print(f"{row['name']} not measured: {row['skipped']}")
    print(summary(rows))
    tables.write_json(args, machine, rows)
    far = [row["name"] for row in rows if abs(row.get("loss_difference", 0.0)) > CLOSE]
    if far and job.pixels.dtype == torch.float32:
        print(f"the loss differs from the recipe's: {', '.join(far)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
