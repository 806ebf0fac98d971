"""Cost of the loss of one micro-batch: logits of every position, or of supervised positions in chunks.

The batch holds 6 questions with the lengths of --shape after their images, with text padded to 64 tokens, and an output
matrix of --vocabulary words with Gemma 2's softcap on its logits. Full logits are computed as in transformers' Gemma 2.

"peak" is the memory of the loss in addition to hidden states and matrix, forward and backward, including the hidden
states' gradient. The matrix's gradient is the same for both; "with its gradient" and the seconds include it.
"floor" is the measured time divided by the least possible time: the products of supervised positions at the machine's
matrix rate, or reading the matrix twice and writing its gradient once, whichever takes longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import clock, models, shapes, tables
from vlmvqa.sequence.loss import supervised_loss
from vlmvqa.sequence.rows import IGNORE, build_row, pad_rows

ROWS, TEXT = 6, 64
SOFTCAP = 30.0
CLOSE = 1e-5
SIZES = {"tiny": (32, 4_000), "mid": (512, 256_000), "real": (2304, 256_000)}  # width and vocabulary


@dataclass(frozen=True)
class Case:
    """Hidden states `[B, T, D]`, labels `[B, T]`, output matrix `[V, D]`."""

    hidden: Tensor
    labels: Tensor
    matrix: Tensor

    def floor(self, machine: tables.Row) -> float:
        """Return the least possible seconds of the loss."""
        supervised = int((self.labels != IGNORE).sum())
        return tables.least_seconds(machine, 6 * supervised * self.matrix.numel(), 3 * self.matrix.nbytes)

    def logits(self, states: Tensor) -> Tensor:
        return torch.tanh(F.linear(states, self.matrix).float() / SOFTCAP) * SOFTCAP


def full_logits(case: Case) -> Tensor:
    """Compute the loss like transformers' Gemma 2: the cap in the weights' dtype, then fp32."""
    logits = F.linear(case.hidden, case.matrix)
    logits = logits / SOFTCAP
    logits = torch.tanh(logits)
    logits = logits * SOFTCAP
    logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), case.labels.flatten(), ignore_index=IGNORE)


def supervised_positions(case: Case) -> Tensor:
    loss, count = supervised_loss(case.hidden, case.labels, case.logits)
    return loss / count


WAYS: dict[str, Callable[[Case], Tensor]] = {
    "full logits": full_logits,
    "supervised positions": supervised_positions,
}


def make_case(args: argparse.Namespace, width: int, vocabulary: int) -> Case:
    shape = shapes.SHAPES[args.shape]
    documents = shapes.apart(shapes.random_documents(shape, ROWS, vocabulary, args.seed))[:ROWS]
    rows = [build_row([d], shape.num_image_tokens, args.attention_pattern, d.images[0]) for d in documents]
    columns = pad_rows(rows, shape.num_image_tokens + TEXT)
    generator = torch.Generator().manual_seed(args.seed)
    dtype = models.dtype_of(args.model)
    hidden = torch.randn(*columns["labels"].shape, width, generator=generator).to(args.device, dtype)
    matrix = (torch.randn(vocabulary, width, generator=generator) * 0.02).to(args.device, dtype)
    return Case(hidden.requires_grad_(), columns["labels"].to(args.device), matrix)


def fitting(vocabulary: int, positions: int, device: str) -> int:
    """Return the vocabulary, halved until full logits and their gradients fit into free memory."""
    info = Path("/proc/meminfo")
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif info.is_file():
        free = 1024 * int(info.read_text().split("MemAvailable:")[1].split()[0])
    else:
        return vocabulary
    while 7 * 4 * positions * vocabulary > free:
        vocabulary //= 2
    return vocabulary


def measure(name: str, case: Case, repeats: int) -> tables.Row:
    """Measure one implementation, with its loss and its gradient of the hidden states."""

    def once(trains: bool) -> tuple[float, Tensor]:
        case.matrix.requires_grad_(trains)
        loss = WAYS[name](case)
        gradients = torch.autograd.grad(loss, [case.hidden, case.matrix] if trains else [case.hidden])
        return loss.item(), gradients[0]

    without = clock.measure(lambda: once(False), case.hidden.device)
    found = clock.measure(lambda: once(True), case.hidden.device, repeats)
    loss, gradient = found.result
    return {
        "name": name,
        "seconds": found.seconds,
        "peak_bytes": without.peak,
        "peak_with_matrix_gradient_bytes": found.peak,
        "loss": loss,
        "gradient": gradient,
    }


def compare(rows: list[tables.Row], floor: float) -> None:
    """Add each row's comparison with full logits, and remove the gradients."""
    full = rows[0]
    expected = full["gradient"]
    for row in rows:
        row["loss_difference"] = row["loss"] - full["loss"]
        difference = (row.pop("gradient") - expected).abs().max() / expected.abs().max()
        row["gradient_difference"] = difference.item()
        row["times_faster"] = full["seconds"] / row["seconds"]
        row["times_floor"] = row["seconds"] / floor
        known = full["peak_bytes"] is not None and row["peak_bytes"]
        row["times_less_memory"] = full["peak_bytes"] / row["peak_bytes"] if known else None


HEADERS = (
    "",
    "seconds",
    "faster",
    "floor",
    "peak MiB",
    "less",
    "with its gradient",
    "loss",
    "difference",
    "of gradient",
)


def cells(row: tables.Row) -> list[str]:
    return [
        row["name"],
        f"{row['seconds']:.3f}",
        tables.times(row["times_faster"]),
        tables.times(row["times_floor"]),
        tables.mib(row["peak_bytes"]),
        tables.times(row["times_less_memory"]),
        tables.mib(row["peak_with_matrix_gradient_bytes"]),
        f"{row['loss']:.6f}",
        f"{row['loss_difference']:+.1e}",
        f"{row['gradient_difference']:.1e}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = tables.parser("loss", __doc__, images=ROWS)
    parser.add_argument("--vocabulary", type=int, help="default: 256,000, or what fits into memory; 4,000 for tiny")
    args = parser.parse_args(argv)
    width, vocabulary = SIZES[args.model]
    positions = ROWS * (shapes.SHAPES[args.shape].num_image_tokens + TEXT)
    args.vocabulary = fitting(args.vocabulary or vocabulary, positions, args.device)
    case = make_case(args, width, args.vocabulary)
    machine = tables.machine(args.device, case.hidden.dtype)
    print(tables.describe(machine))
    print(
        f"{ROWS} rows of {case.labels.shape[1]} tokens, {int((case.labels != IGNORE).sum())} supervised, "
        f"width {width}, vocabulary {args.vocabulary:,}"
    )
    rows = [measure(name, case, args.repeats) for name in WAYS]
    compare(rows, case.floor(machine))
    print(tables.table(HEADERS, [cells(row) for row in rows]))
    tables.write_json(args, machine, rows)
    exact = case.hidden.dtype == torch.float32
    if exact and any(abs(row["loss_difference"]) > CLOSE or row["gradient_difference"] > CLOSE for row in rows):
        print("loss or gradient differs from that of full logits")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
