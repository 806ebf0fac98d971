"""Growth of our model's cost with questions per image, prompt length, image size and batch size.

Each series changes one number; one row per image, dense attention. The table shows the measured time (forward and
backward) and the needed operations (`models.needed_flops`) as multiples of the series' first value. Time should grow
like the operations. It grows more slowly if a fixed cost (one pass over all weights' gradients) dominates at the start,
and faster if work outside the model dominates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from bench import clock, models, shapes, tables
from vlmvqa.sequence.rows import Document, TokenizedQuestion

ANSWER = 2  # tokens, with EOS


@dataclass(frozen=True)
class Setting:
    """A batch: number and size of the images, questions per image, tokens per prompt."""

    questions: int = 5
    prompt: int = 12
    image_size: int = 224
    images: int = 4


# By the number that changes: its values, and the other settings.
SERIES = {
    "questions": ((1, 2, 4, 8, 16), Setting()),
    "prompt": ((8, 16, 32, 64), Setting()),
    "image_size": ((112, 224, 336, 448), Setting(images=1)),
    "images": ((1, 2, 4, 8), Setting()),
}
NAMES = {
    "questions": "questions an image",
    "prompt": "prompt tokens",
    "image_size": "pixels a side",
    "images": "images a batch",
}


def documents(setting: Setting, vocabulary: int) -> list[Document]:
    def question(number: int) -> TokenizedQuestion:
        words = [shapes.FIRST_WORD + (number + place) % (vocabulary - shapes.FIRST_WORD) for place in range(60)]
        prompt = [shapes.BOS, *(words * setting.prompt)[: setting.prompt - 1]]
        return TokenizedQuestion(prompt, [*words[: ANSWER - 1], shapes.EOS])

    return [Document([image], [question(n) for n in range(setting.questions)]) for image in range(setting.images)]


# One model at a time, so that the previous one's memory is freed.
_model = lru_cache(maxsize=1)(models.build_model)


def measure(args: argparse.Namespace, setting: Setting) -> tables.Row:
    shape = replace(shapes.SHAPES[args.shape], image_size=setting.image_size)
    model = _model(args.model, shape, args.device, args.seed, args.attention_pattern)
    rows = [[document] for document in documents(setting, models.vocabulary(model))]
    batch = models.make_batch(model, rows, models.random_pixels(model, setting.images, args.seed))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch)["loss"].backward()

    found = clock.measure(step, models.device_of(model), args.repeats)
    return {
        "tokens": batch["input_ids"].numel(),
        "seconds": found.seconds,
        "peak_bytes": found.peak,
        "flops": models.needed_flops(model, batch),
    }


def series(args: argparse.Namespace, name: str) -> Iterator[tables.Row]:
    """Yield the rows of one series, each with its growth relative to the first."""
    values, base = SERIES[name]
    first: tables.Row | None = None
    for value in values:
        row = measure(args, replace(base, **{name: value}))
        first = first or row
        yield {
            "series": name,
            "value": value,
            **row,
            "growth": row["seconds"] / first["seconds"],
            "expected_growth": row["flops"] / first["flops"],
        }


HEADERS = ("tokens", "seconds", "GFLOP", "time grew", "operations grew", "matrix rate", "peak MiB")


def cells(row: tables.Row, matrix_rate: float) -> list[str]:
    return [
        str(row["value"]),
        str(row["tokens"]),
        f"{row['seconds']:.3f}",
        f"{row['flops'] / 1e9:.1f}",
        f"{row['growth']:.2f}x",
        f"{row['expected_growth']:.2f}x",
        f"{100 * row['flops'] / row['seconds'] / matrix_rate:.0f} %",
        tables.mib(row["peak_bytes"]),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = tables.parser("scaling", __doc__, images=0)
    parser.add_argument("--series", choices=SERIES, nargs="+", default=list(SERIES), help="default: all")
    args = parser.parse_args(argv)
    machine = tables.machine(args.device, models.dtype_of(args.model))
    print(tables.describe(machine))
    rows: list[tables.Row] = []
    for name in args.series:
        found = list(series(args, name))
        print()
        print(tables.table((NAMES[name], *HEADERS), [cells(r, machine["matrix_flops_per_second"]) for r in found]))
        rows += found
    tables.write_json(args, machine, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
